"""What Ray does not promise to keep, and we use all the same: here and nowhere else.

With another Ray, look here first. Ray is imported when it is needed, which takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve._private.request_router.common import PendingRequest as PendingRequest
    from ray.serve._private.request_router.replica_wrapper import RunningReplica as RunningReplica


@dataclass(frozen=True)
class Replica:
    """What Serve's controller says of a replica."""

    name: str
    deployment: str
    running: bool
    stopping: bool
    pid: int | None


def reread_settings() -> None:
    """Make Ray read its variables again: it does so once a process, when it is imported, which may
    have been long ago, and keeps the token of an earlier Ray."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def serve_client() -> Any:
    """Serve's client in this process, connected if Serve runs on its Ray; None where it does not.

    The public calls start a Ray, or a Serve, where there is none.
    """
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def forget_serve() -> None:
    """Drop that client, which outlives its Ray."""
    from ray.serve.context import _set_global_client

    _set_global_client(None)


def serve_replicas(app: str) -> list[Replica]:
    """The application's replicas; empty when Serve is not running."""
    from ray.serve._private.common import ReplicaState

    client = serve_client()
    if client is None:
        return []
    # As plain values: parsing Serve's whole schema every few seconds costs a process 3 %.
    application = client.get_serve_details()["applications"].get(app)
    found = []
    for name, deployment in (application["deployments"] if application else {}).items():
        for replica in deployment["replicas"]:
            state = ReplicaState(replica["state"])
            running, stopping = state is ReplicaState.RUNNING, state is ReplicaState.STOPPING
            found.append(
                Replica(replica["replica_id"], name, running, stopping, replica.get("pid"))
            )
    return found


def start_fewer(trainer: Any, *, alone: bool) -> None:
    """Keep a Ray Train `trainer` from starting processes that a job of ours has no use for, of
    which each costs two seconds of a core: the one that deals out Ray's datasets, which it is not
    given, and where the Ray is this program's `alone`, the one that frees the workers' places
    after their controller was killed. Then such a Ray ends, too.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    idle = (DatasetsCallback, PlacementGroupCleanerCallback) if alone else (DatasetsCallback,)
    create = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [c for c in create() if not isinstance(c, idle)]
