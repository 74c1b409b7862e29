"""What the models of an editor share: a thread, a measure of what it can do, and its streams."""

from __future__ import annotations

import itertools
from collections import Counter

from serve.admission.rungs import NAMES
from serve.editor.capacity import Capacity
from serve.editor.scheduler import Scheduler
from serve.editor.stream import EditorStream
from serve.metrics import EditorMetrics
from serve.wire.protocol import WireError


class Accelerator:
    """Args:
    max_sessions: Upper bound; below it `Capacity` decides, unless `measured` is False.
    degrade: Whether sessions are edited less well before others are refused.
    """

    def __init__(
        self,
        *,
        max_sessions: int = 8,
        measured: bool = True,
        degrade: bool = False,
    ) -> None:
        self.scheduler = Scheduler()
        self.capacity = Capacity(max_sessions=max_sessions, measured=measured, degrade=degrade)
        self.streams: dict[str, EditorStream] = {}  # by session
        self.asked = itertools.count()  # streams, in their order
        self.broken = ""
        self._busy_told = 0.0  # of `Scheduler.busy_s`, to the metrics

    def check(self) -> None:
        """Raises RuntimeError when its thread is stuck or the device is broken."""
        if limit_s := self.scheduler.stuck_s:
            message = f"one chunk has been running for more than {limit_s:g} s"
            for stream in self.streams.values():
                if stream.running:  # its session must not do the same to the next editor
                    stream.end(WireError("internal", message))
            raise RuntimeError(message)
        if self.broken:
            raise RuntimeError(f"the accelerator is broken: {self.broken}")

    def gauge(self, metrics: EditorMetrics, chunk_s: float) -> None:
        """Sets the editor's gauges to what is true now; `chunk_s` is what a chunk costs."""
        metrics.load.set(self.capacity.load)
        metrics.sessions.set(len(self.capacity.loads))
        on = Counter(self.capacity.rung(name).name for name in self.capacity.loads)
        for name in NAMES:
            metrics.rungs.labels(name).set(on[name])
        metrics.chunk.set(chunk_s)
        metrics.queue.set(self.scheduler.waiting)
        metrics.busy.inc(self.scheduler.busy_s - self._busy_told)
        self._busy_told = self.scheduler.busy_s
