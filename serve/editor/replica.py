"""The editor deployment: one accelerator, the models on it, and the streams that it works on."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

import torch
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from serve.admission.admission import Sizes
from serve.editor import gpu
from serve.editor.accelerator import Accelerator
from serve.editor.shelf import Shelf
from serve.hub.client import HubClient
from serve.hub.hub import GONE_S, REPORT_S, Orders, Report
from serve.logs import join_serve_log
from serve.metrics import EditorMetrics
from serve.settings import ServeSettings
from serve.versions.source import ModelSource, Named
from serve.wire.conversation import KINDS, answer
from serve.wire.link import Address, Link
from serve.wire.work import Opening
from serve.work_sizes import WorkSizes

log = logging.getLogger(__name__)


class EditorReplica:
    """Serve counts a session as one ongoing request: the call of `edit` that lasts as long."""

    def __init__(self, settings: ServeSettings, serves: tuple[Named, ...]) -> None:
        join_serve_log()
        context = ray_serve.get_replica_context()
        self.process = context.replica_id.unique_id
        self.hub = HubClient(context.app_name, settings, serves)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        on = Accelerator(
            max_sessions=settings.max_sessions,
            measured=settings.measured_capacity,
            degrade=settings.degrade,
        )
        sizes = WorkSizes(settings.limits, settings.work_size, settings.detail)

        def usual(source: ModelSource) -> list[Sizes]:
            found = (sizes.usual(frame, source.trained) for frame in settings.warm_frames)
            return [replace(each, model=source.key) for each in found]

        self.shelf = Shelf(on, device=device, fp8=settings.fp8, usual=usual, tell=self._tell)
        # Before the replica counts as started: a session must not meet a cold model.
        for source in self.hub.first():
            self.shelf.put(source)
        self.metrics = EditorMetrics()
        self._reporting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._wanted, self._told_at = 0, 0.0
        self._going = False

    def _tell(self, doing: str) -> None:
        """What it does before it is ready, for `/readyz`."""
        log.info("%s: %s", self.process, doing)
        self.hub.starting(self.process, doing)

    async def edit(self, opening: Opening, address: Address) -> None:
        """Lasts as long as the stream, and holds its place; all that is said goes to `address`."""
        log.info("session %s: stream %s opens", opening.session, opening.stream)
        try:
            link = await Link.connect(address, KINDS)
            try:
                await answer(self.shelf, opening, link)
            finally:
                link.close()
        except OSError as error:
            log.info("session %s: stream %s: %s", opening.session, opening.stream, error)
        finally:
            log.info("session %s: stream %s ends", opening.session, opening.stream)

    async def check_health(self) -> None:
        """Called by Serve every few seconds; raises when this replica must be replaced."""
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.ensure_future(self._report())
        if self._watching is None:
            self._watching = asyncio.ensure_future(gpu.watch(self.shelf.device, self.metrics))
        self.shelf.on.check()
        if self._going and not self.shelf.on.capacity.loads:
            raise RuntimeError("this editor is one too many and has no sessions: it goes")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every second, for `decisions.follow`."""
        fresh = time.monotonic() - self._told_at < GONE_S
        return {"wanted": float(self._wanted) if fresh else 0.0}

    async def _report(self) -> None:
        while True:
            self.shelf.gauge(self.metrics)
            report = Report(
                self.process,
                self.metrics.snapshot(),
                self.shelf.describe(),
                self.shelf.known(self.process),
                failed=dict(self.shelf.failed),
            )
            try:
                orders: Orders = await self.hub.call("report", report)
                for key in report.failed:  # told once, so that it can be tried again
                    self.shelf.failed.pop(key, None)
                self._wanted, self._told_at = orders.wanted, time.monotonic()
                self._going = self._going or orders.go
                if orders.leave or orders.go:
                    self.shelf.leave()
                self.shelf.order(orders.load, orders.drop)
            except (RayActorError, TimeoutError) as error:
                log.warning("the hub does not answer: %s", error)
            await asyncio.sleep(REPORT_S)


def describe_deployment(settings: ServeSettings) -> dict[str, Any]:
    """Options of the editor deployment, for `ray.serve.deployment`."""
    options: dict[str, Any] = {
        "name": "editor",
        "logging_config": settings.logging,
        "max_ongoing_requests": settings.max_sessions,
        "graceful_shutdown_timeout_s": settings.drain_s,
        "health_check_period_s": 2.0,
        "request_router_config": RequestRouterConfig(
            request_router_class="serve.admission.router.PlacedRouter"  # type: ignore[arg-type]
        ),
        "ray_actor_options": {
            "num_cpus": settings.editor_cpus,
            "num_gpus": settings.editor_gpus,
        },
    }
    if settings.max_editors > settings.min_editors:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=settings.min_editors,
            max_replicas=settings.max_editors,
            policy=AutoscalingPolicy(policy_function="serve.admission.decisions:follow"),
            metrics_interval_s=1.0,
            # The hub has waited already (`decisions.wanted`).
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
        )
    else:
        options["num_replicas"] = settings.min_editors
    return options
