"""Ray Serve's routing of a stream: to the editor that `serve.hub.placement` chose."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ray.serve.request_router import RequestRouter

if TYPE_CHECKING:
    from infra.runtime.ray_private import PendingRequest, RunningReplica


ANY_BUT = "-"  # before the names of editors


def route(editor: str, avoid: Collection[str] = ()) -> str:
    """The `session_id` of a call to this editor; where none is named, to any that is not of
    `avoid`."""
    return editor or ANY_BUT + ",".join(sorted(avoid))


class PlacedRouter(RequestRouter):
    """A call's `session_id` option is its `route`. Where that is no replica (any more), any other
    will do: the editor decides itself whether it has room."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        wanted = pending_request.metadata.session_id if pending_request else ""
        avoid = wanted.removeprefix(ANY_BUT).split(",") if wanted.startswith(ANY_BUT) else None
        chosen = [
            replica
            for replica in candidate_replicas
            if (name := replica.replica_id.unique_id) == wanted
            or (avoid is not None and name not in avoid)
        ]
        return [chosen or candidate_replicas]
