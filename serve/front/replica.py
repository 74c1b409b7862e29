"""The front deployment: Serve's ingress, a `Front` whose editors and records are elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from serve.front.door import Door
from serve.front.front import Front
from serve.front.ray_backend import RayBackend
from serve.hub.client import HubClient
from serve.hub.hub import REPORT_S, Orders, Report, link_host
from serve.hub.recent import Recent
from serve.logs import join_serve_log
from serve.metrics import Metrics, Readings
from serve.settings import ServeSettings
from serve.tenants import Tenants
from serve.versions.source import Named, menu_of
from serve.wire import conversation
from serve.wire.link import Listener
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.work_sizes import WorkSizes

log = logging.getLogger(__name__)

EDIT_SHARE = 0.8  # of a drain's time that whole videos have; Serve kills at its end
FRESH_S = 0.5  # processes report to the hub every second
ANSWER_S = 3.0  # for the hub, which a scrape or a page waits for


@ray_serve.ingress()
class FrontReplica:
    def __init__(
        self, settings: ServeSettings, serves: tuple[Named, ...], editors: DeploymentHandle
    ) -> None:
        join_serve_log()
        context = ray_serve.get_replica_context()
        self.process = context.replica_id.unique_id
        self.hub = HubClient(context.app_name, settings, serves)
        self._began = time.time()
        self._menu = menu_of(serves)  # as it is before the hub says otherwise
        self.metrics = Metrics(settings.gpu_hour_cost)
        listener = Listener(link_host(settings), conversation.KINDS)
        self.front = Front(
            backend=RayBackend(editors, listener, self.hub.places),
            store=self.hub.store,
            sizes=WorkSizes(settings.limits, settings.work_size, settings.detail),
            metrics=self.metrics,
            door=Door(Tenants(settings.token_file), settings.allowed_origins),
            ledger=self.hub.ledger,
            name=self.process,
            grace_s=EDIT_SHARE * settings.drain_s,
            traces=settings.traces,
            listener=Listener(link_host(settings), ()),
            models=self.models,
            menu=lambda: self._menu,
            notes=partial(self._ask, "notes"),
            snapshots=self.snapshots,
        )
        self._reporting: asyncio.Task[None] | None = None
        self._recent = Recent(self.hub.call, FRESH_S)

    def __serve_build_asgi_app__(self) -> Starlette:
        return self.front.app

    async def models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = await self._ask("models")
        if not models:
            doing: str = await self._ask("started")
            message = f"no editor is warmed up yet{doing and ': '}{doing}"
            raise WireError("at_capacity", message, RETRY_AFTER_S)
        return models

    async def snapshots(self) -> dict[str, Readings]:
        """This process's are there whatever becomes of the others."""
        others: dict[str, Readings] = {}
        try:
            others = await self._ask("snapshots")
        except WireError as error:
            log.warning("metrics of this process only: %s", error.message)
        return {**others, self.process: self.metrics.snapshot()}

    async def _ask(self, method: str) -> Any:
        """What everybody may ask, and so often: the hub is asked at most every `Recent.age_s`."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._recent.get(method)
        except (RayActorError, TimeoutError) as error:
            log.warning("the hub does not answer %s: %s", method, error)
            raise WireError("internal", "the server's records do not answer") from error

    async def check_health(self) -> None:
        """Called by Serve every few seconds."""
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.ensure_future(self._report())

    async def _report(self) -> None:
        while True:
            try:
                report = Report(
                    self.process, self.metrics.snapshot(), connections=self.front.open_connections,
                    serves=self.hub.serves, began=self._began,
                    settings=self.hub.settings,
                )  # fmt: skip
                orders: Orders = await self.hub.call("report", report)
                self._menu = orders.menu or self._menu
                if orders.stop:
                    self.front.stop()
                elif orders.leave:
                    self.front.leave()
            except (RayActorError, TimeoutError) as error:
                log.warning("the hub does not answer: %s", error)
            await asyncio.sleep(REPORT_S)


def describe_deployment(settings: ServeSettings) -> dict[str, Any]:
    """Options of the front deployment, for `ray.serve.deployment`."""
    return {
        "name": "front",
        "logging_config": settings.logging,
        "num_replicas": settings.fronts,
        # Sessions are refused by the front itself, with a message; a few more for plain HTTP.
        "max_ongoing_requests": settings.limits.max_sessions + settings.limits.max_silent + 64,
        "graceful_shutdown_timeout_s": settings.drain_s,
        "health_check_period_s": 2.0,
        "ray_actor_options": {"num_cpus": settings.front_cpus},
    }
