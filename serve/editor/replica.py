"""The editor deployment: one model on one accelerator, and the streams that it works on."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import torch
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from modeling.editor import StreamingEditor
from serve.editor.engine import Engine
from serve.editor.model_source import ModelSource
from serve.hub.hub import GONE_S, REPORT_S, HubClient, Orders, Report
from serve.logs import join_serve_log
from serve.metrics import EditorMetrics
from serve.settings import ServeSettings
from serve.wire.conversation import KINDS, answer
from serve.wire.link import Address, Link
from serve.wire.work import Opening
from serve.work_sizes import WorkSizes

log = logging.getLogger(__name__)


class EditorReplica:
    """Serve counts a session as one ongoing request: the call of `edit` that lasts as long."""

    def __init__(self, settings: ServeSettings, model: ModelSource) -> None:
        join_serve_log()
        context = ray_serve.get_replica_context()
        self.process = context.replica_id.unique_id
        self.hub = HubClient(context.app_name, settings)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model.check()
        editor = StreamingEditor.load(
            settings.model, device=device, name=model.name, fp8=settings.fp8, tell=self._tell
        )
        self.engine = Engine(
            editor,
            max_sessions=settings.max_sessions,
            measured=settings.measured_capacity,
            degrade=settings.degrade,
        )
        # Before the replica counts as started: a session must not meet a cold model.
        sizes = WorkSizes(model.trained, settings.limits, settings.work_size, settings.detail)
        usual = [sizes.usual(frame) for frame in settings.warm_frames]
        seconds = self.engine.warm_up(usual, self._tell)
        log.info("%s on %s: a chunk costs %.0f ms", editor.name, device, seconds * 1000)
        self.metrics = EditorMetrics()
        self._reporting: asyncio.Task[None] | None = None
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
                await answer(self.engine, opening, link)
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
        self.engine.check()
        if self._going and not self.engine.capacity.loads:
            raise RuntimeError("this editor is one too many and has no sessions: it goes")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every second, for `decisions.follow`."""
        fresh = time.monotonic() - self._told_at < GONE_S
        return {"wanted": float(self._wanted) if fresh else 0.0}

    async def _report(self) -> None:
        while True:
            self.engine.gauge(self.metrics)
            report = Report(
                self.process,
                self.metrics.snapshot(),
                self.engine.describe(),
                self.engine.capacity.known(self.process),
            )
            try:
                orders: Orders = await self.hub.call("report", report)
                self._wanted, self._told_at = orders.wanted, time.monotonic()
                self._going = self._going or orders.go
                if orders.leave or orders.go:
                    self.engine.leave()
            except RayActorError as error:
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
            request_router_class="serve.scaling.router.PlacedRouter"  # type: ignore[arg-type]
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
            policy=AutoscalingPolicy(policy_function="serve.scaling.decisions:follow"),
            metrics_interval_s=1.0,
            # The hub has waited already (`decisions.wanted`).
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
        )
    else:
        options["num_replicas"] = settings.min_editors
    return options
