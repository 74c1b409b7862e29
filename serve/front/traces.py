"""A chunk's way through front, link, queue, device and codec, as one OpenTelemetry trace a chunk.

Everything is told by the front: what an editor spent on its side comes with the answer, so clocks
of several machines are never compared. A link's time is what is left of the way there and back, of
which half is taken to be each. Nothing of this is made, nor OpenTelemetry imported, without the
setting `traces`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.runtime.errors import UserError
from serve.delivery.session import Delivery
from serve.wire.work import Opening

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

OTLP = "otlp"  # to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names
WRITE_MS = 1000  # how often spans are written
REMEDY = 'pip install -e ".[traces]", or leave the setting traces out'


def tracer(to: str, process: str) -> Tracer:
    """What makes spans: `to` is `OTLP`, or a folder for a file of JSON lines of this process.

    Raises UserError where OpenTelemetry is not installed, or the folder cannot be written.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import (
            BatchSpanProcessor,
            ConsoleSpanExporter,
            SpanExporter,
        )
    except ImportError as error:
        raise UserError(f"traces need OpenTelemetry ({error}): {REMEDY}") from error
    exporter: SpanExporter
    if to == OTLP:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise UserError(f"traces to {OTLP} need its exporter ({error}): {REMEDY}") from error
        exporter = OTLPSpanExporter()
    else:
        try:
            Path(to).mkdir(parents=True, exist_ok=True)
            out = (Path(to) / f"{process}.jsonl").open("a", buffering=1)
        except OSError as error:
            raise UserError(f"serve setting traces: {error}; name a folder, or {OTLP}") from error
        exporter = ConsoleSpanExporter(
            out=out, formatter=lambda span: f"{span.to_json(indent=None)}\n"
        )
    provider = TracerProvider(
        resource=Resource({"service.name": "liveedit", "service.instance.id": process})
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=WRITE_MS))
    return provider.get_tracer("liveedit.front")


@dataclass
class _Read:
    """A source frame: when its message was there, and its pixels. `time.monotonic()`."""

    index: int
    came: float
    decoded: float


@dataclass
class _Chunk:
    """An edited chunk, until its last frame is sent."""

    reads: list[_Read]
    delivery: Delivery
    begun: float  # to be encoded
    encoded: float
    kept: float  # in the hub, for who comes back
    left: int  # frames that are not sent
    first_sent: float = 0.0


class ChunkTraces:
    """Of one session; the chunks follow each other in all that is said."""

    def __init__(self, tracer: Tracer, opening: Opening, tenant: str) -> None:
        self._tracer, self._opening, self._tenant = tracer, opening, tenant
        self._reads: deque[_Read] = deque()
        self._chunks: deque[_Chunk] = deque()

    def read(self, index: int, came: float) -> None:
        """Frame `index`, whose message came then, is decoded now."""
        self._reads.append(_Read(index, came, time.monotonic()))

    def made(self, delivery: Delivery, begun: float, encoded: float) -> None:
        """An edited chunk is encoded and kept, and may be sent."""
        if not delivery.frames:
            return
        reads, last = [], delivery.frames[-1].index
        while self._reads and self._reads[0].index <= last:
            reads.append(self._reads.popleft())
        if reads:  # else it came before this front had the session
            now, count = time.monotonic(), len(delivery.frames)
            self._chunks.append(_Chunk(reads, delivery, begun, encoded, now, count))

    def sent(self) -> None:
        """The client took a frame."""
        if not self._chunks:
            return
        chunk, now = self._chunks[0], time.monotonic()
        chunk.first_sent = chunk.first_sent or now
        chunk.left -= 1
        if chunk.left == 0:
            self._tell(self._chunks.popleft(), now)

    def _tell(self, chunk: _Chunk, sent: float) -> None:
        edited, opening, reads = chunk.delivery.edited, self._opening, chunk.reads
        given, answered = chunk.delivery.given, chunk.delivery.answered
        held = edited.held_ms / 1000
        link = max(0.0, answered - given - held) / 2
        arrived = given + link
        started = arrived + edited.wait_ms / 1000
        done = started + edited.compute_ms / 1000
        leaves = arrived + max(held, done - arrived)
        came, there = reads[-1].came, reads[-1].decoded
        begun = max(answered, chunk.begun)  # frames go ahead of their chunk, to be encoded
        encoded = max(answered, chunk.encoded)
        spans: tuple[tuple[str, float, float, dict[str, int | float | bool]], ...] = (
            ("front.receive", reads[0].came, came, {"frames": len(reads)}),
            ("codec.decode", came, there, {}),
            ("front.wait", there, given, {}),
            ("link.out", given, arrived, {"half_of_both_ways": True}),
            ("editor.queue", arrived, started, {}),
            ("editor.device", started, done, {"ahead_ms": edited.ahead_ms}),
            ("editor.state", done, leaves, {}),
            ("link.back", leaves, answered, {"half_of_both_ways": True}),
            ("front.queue", answered, begun, {}),
            ("codec.encode", begun, encoded, {"ahead_ms": 1000 * (begun - chunk.begun)}),
            ("hub.commit", encoded, chunk.kept, {}),
            ("front.send", chunk.kept, chunk.first_sent, {}),
            ("front.pace", chunk.first_sent, sent, {}),
        )
        from opentelemetry.trace import set_span_in_context

        wall = time.time_ns() - time.monotonic_ns()
        root = self._tracer.start_span(
            "chunk",
            start_time=wall + round(reads[0].came * 1e9),
            attributes={
                "session": opening.session,
                "tenant": self._tenant,
                "chunk": edited.index,
                "first_frame": chunk.delivery.frames[0].index,
                "frames": len(chunk.delivery.frames),
                "size": f"{opening.width}x{opening.height}",
                "work_size": edited.work_size,
                "fps": opening.fps,
                "mode": opening.mode,
                "rung": edited.rung,
                "steps": edited.steps,
                "recomputed": edited.recomputed,
                "latency_ms": 1000 * (chunk.first_sent - came),
            },
        )
        inside = set_span_in_context(root)
        for name, began, ended, more in spans:
            span = self._tracer.start_span(
                name, inside, start_time=wall + round(began * 1e9), attributes=more
            )
            span.end(wall + round(max(began, ended) * 1e9))
        root.end(wall + round(sent * 1e9))
