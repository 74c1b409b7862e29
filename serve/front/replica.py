"""The front deployment: Serve's ingress, a `Front` whose editors and records are elsewhere."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address
from starlette.applications import Starlette

from serve.front.front import Front
from serve.front.ray_backend import RayBackend
from serve.hub.hub import REPORT_S, HubStore, Report
from serve.logs import join_serve_log
from serve.metrics import Metrics, Snapshot
from serve.settings import ServeSettings
from serve.wire.link import Inbox
from serve.wire.protocol import RETRY_AFTER_S, WireError

log = logging.getLogger(__name__)


@ray_serve.ingress()
class FrontReplica:
    def __init__(self, settings: ServeSettings, editors: DeploymentHandle) -> None:
        join_serve_log()
        context = ray_serve.get_replica_context()
        self.process = context.replica_id.unique_id
        self.hub = HubStore(context.app_name, settings.limits.resume_s)
        self.metrics = Metrics()
        self.front = Front(
            backend=RayBackend(editors, Inbox(get_node_ip_address())),
            store=self.hub,
            limits=settings.limits,
            metrics=self.metrics,
            tokens=settings.tokens(),
            models=self.models,
            snapshots=self.snapshots,
        )
        self._reporting: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Starlette:
        return self.front.app

    async def models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = await self._ask("models")
        if not models:
            raise WireError("at_capacity", "no editor is warmed up yet", RETRY_AFTER_S)
        return models

    async def snapshots(self) -> dict[str, Snapshot]:
        snapshots: dict[str, Snapshot] = await self._ask("snapshots")
        return {**snapshots, self.process: self.metrics.snapshot()}

    async def _ask(self, method: str) -> Any:
        try:
            return await self.hub.call(method)
        except RayActorError as error:
            raise WireError("internal", f"the hub does not answer: {error}") from error

    async def check_health(self) -> None:
        """Called by Serve every few seconds."""
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.ensure_future(self._report())

    async def _report(self) -> None:
        while True:
            try:
                if await self.hub.call("report", Report(self.process, self.metrics.snapshot())):
                    self.front.leave()
            except RayActorError as error:
                log.warning("the hub does not answer: %s", error)
            await asyncio.sleep(REPORT_S)


def describe_deployment(settings: ServeSettings) -> dict[str, Any]:
    """Options of the front deployment, for `ray.serve.deployment`."""
    return {
        "name": "front",
        "num_replicas": settings.fronts,
        # Sessions are refused by the front itself, with a message; a few more for plain HTTP.
        "max_ongoing_requests": settings.limits.max_sessions + 64,
        "graceful_shutdown_timeout_s": settings.drain_s,
        "health_check_period_s": 2.0,
        "ray_actor_options": {"num_cpus": settings.front_cpus},
    }
