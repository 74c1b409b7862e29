"""Ray Serve's routing of a stream: to the editor that `serve.hub.placement` chose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.serve.request_router import RequestRouter

if TYPE_CHECKING:
    from infra.runtime.ray_private import PendingRequest, RunningReplica


class PlacedRouter(RequestRouter):
    """A call's `session_id` option names the replica. Where it is not (or no longer) one, any will
    do: the editor decides itself whether it has room."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        wanted = pending_request.metadata.session_id if pending_request else ""
        chosen = [r for r in candidate_replicas if r.replica_id.unique_id == wanted]
        return [chosen or candidate_replicas]
