"""What a session counts as: its tenant's limits, the metrics, the log's lines.

Both ways in are sessions: a WebSocket and `POST /v1/edits`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

from serve.admission.rungs import FULL, NAMES
from serve.delivery.session import Delivery
from serve.front.door import Visitor
from serve.hub.ledger import Ledger, Usage
from serve.logs import event
from serve.metrics import Metrics
from serve.wire.work import Opening

log = logging.getLogger(__name__)

STALL_CHUNKS = 1.5  # chunk durations without an edited frame that count as a stall


class Account:
    def __init__(
        self,
        visitor: Visitor,
        opening: Opening,
        *,
        metrics: Metrics,
        ledger: Ledger,
        usage: Usage,
    ) -> None:
        self.visitor, self.opening = visitor, opening
        self.admitted = False
        self.gpu_s = 0.0
        self.key = (opening.session, opening.epoch)
        self._metrics, self._ledger, self._usage = metrics, ledger, usage
        self._models: list[str] = []  # that have edited it, the newest last
        self._started = self._counted = time.monotonic()
        self._edited = self._dropped = 0
        self._chunks = Counter[str]()  # by the rung that they were edited on
        self._frames_sent_at: float | None = None

    async def enter(self) -> None:
        """Before it asks for an editor. Raises WireError `at_capacity` when its tenant may not."""
        await self._ledger.enter(self.key, self.visitor.tenant)
        self._usage.begin(self.key, self.visitor.tenant.name)

    def opened(self, model: str) -> None:
        """An editor has it, or has it again."""
        resumed = self.opening.epoch > 0
        self._models, self.admitted, self._counted = [model], True, time.monotonic()
        self._usage.charge(self.key)
        (self._metrics.resumed if resumed else self._metrics.admitted).labels(**self._who).inc()
        self._metrics.sessions.inc()
        opening = self.opening
        name = "resumed" if resumed else "opened"
        event(
            log, name, f"session %s: {name} for %s from %s: %dx%d at %g fps, %s, by %s",
            session=opening.session, tenant=self.visitor.tenant.name, client=self.visitor.client,
            width=opening.width, height=opening.height, fps=opening.fps, mode=opening.mode,
            model=model,
        )  # fmt: skip

    def delivered(self, delivery: Delivery, *, chunk_frames: int, dropped: int) -> None:
        """A chunk is edited; `dropped` are the session's frames that were, so far."""
        if delivery.model and delivery.model != self._models[-1]:
            event(
                log, "rolled", "session %s: goes on by %s",
                session=self.opening.session, model=delivery.model,
            )  # fmt: skip
            self._models.append(delivery.model)
        metrics, edited, who = self._metrics, delivery.edited, self._who
        metrics.dropped.labels(**who).inc(dropped - self._dropped)
        self._dropped = dropped
        if not delivery.frames:
            return
        self.gpu_s += edited.device_s
        self._edited += len(delivery.frames)
        self._chunks[edited.rung] += 1
        if edited.rung != FULL:
            metrics.lowered.labels(rung=edited.rung, **who).inc()
        metrics.gpu_seconds.labels(**who).inc(edited.device_s)
        if metrics.gpu_hour_cost:
            metrics.cost.labels(**who).inc(edited.device_s / 3600 * metrics.gpu_hour_cost)
        self._count_time()
        metrics.frames.labels(**who).inc(len(delivery.frames))
        metrics.recomputed.observe(edited.recomputed)
        metrics.chunk_latency.observe(delivery.latency_s)
        if edited.index == 0:
            metrics.first_chunk.observe(time.monotonic() - self._started)
        if self.opening.mode == "live":
            met = delivery.latency_s <= chunk_frames / self.opening.fps
            metrics.deadlines.labels(met="yes" if met else "no", **who).inc()

    def sent(self, *, chunk_frames: int, frame_at: float) -> None:
        """The client took an edited frame; the last source frame came at `frame_at`."""
        now = time.monotonic()
        period = STALL_CHUNKS * chunk_frames / self.opening.fps
        if self._frames_sent_at is not None and self.opening.mode == "live":
            # A source that pauses is no stall: frames have to have come all the while.
            quiet_source = now - frame_at > period
            if now - self._frames_sent_at > period and not quiet_source:
                self._metrics.stalls.labels(**self._who).inc()
        self._frames_sent_at = now

    async def ended(self, outcome: str) -> None:
        """It is over here, whatever came of it."""
        if self.admitted:
            seconds = time.monotonic() - self._started
            self._count_time()
            self._metrics.sessions.dec()
            self._metrics.ended.labels(reason=outcome, **self._who).inc()
            self._metrics.session_seconds.observe(seconds)
            self._metrics.session_gpu.observe(self.gpu_s)
            event(
                log, "ended",
                "session %s: %s after %.1f s, %d frames edited, %d dropped, %.2f s of compute; "
                "%dx%d at %g fps, %s, for %s from %s, by %s; edited %s",
                session=self.opening.session, reason=outcome, seconds=round(seconds, 1),
                frames=self._edited, dropped=self._dropped, gpu_s=round(self.gpu_s, 2),
                width=self.opening.width, height=self.opening.height, fps=self.opening.fps,
                mode=self.opening.mode, tenant=self.visitor.tenant.name,
                client=self.visitor.client, model=", ".join(self._models),
                quality=self._quality,
            )  # fmt: skip
        self._usage.end(self.key)
        await self._ledger.leave(self.key)

    def _count_time(self) -> None:
        """While it lasts, so that long sessions are seen before they end."""
        now = time.monotonic()
        self._metrics.connected.labels(**self._who).inc(now - self._counted)
        self._counted = now

    @property
    def _quality(self) -> str:
        """How its chunks were edited, in words."""
        if set(self._chunks) <= {FULL}:
            return "as asked"
        total = self._chunks.total()
        told = (f"{self._chunks[name]} on {name}" for name in NAMES if self._chunks[name])
        return f"{', '.join(told)} of {total} chunks"

    @property
    def _who(self) -> dict[str, str]:
        return {"tenant": self.visitor.tenant.name, "model": self._models[-1]}


def refused(metrics: Metrics, code: str, message: str, *, tenant: str, client: str) -> None:
    """An open that came to nothing; `tenant` is empty for who was not let in."""
    metrics.refused.labels(code=code, tenant=tenant).inc()
    event(
        log, "refused", "refused: %s: %s; for %s from %s",
        code=code, reason=message, tenant=tenant or "nobody", client=client,
    )  # fmt: skip
