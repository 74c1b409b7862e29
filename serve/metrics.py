"""What an operator watches, as Prometheus metrics; one `Metrics` a process.

A scrape reaches one front only, so every process hands its numbers in (`snapshot`) and `render`
writes them all, told apart by the label `process`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric

LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
SESSION_BUCKETS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
SHARE_BUCKETS = tuple(n / 10 for n in range(1, 11))

Snapshot = list[Metric]


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"liveedit_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"liveedit_{name}", text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"liveedit_{name}", text, registry=registry)

        # The front's.
        self.sessions = gauge("sessions", "Sessions that are connected")
        self.admitted = counter("sessions_admitted_total", "Sessions opened")
        self.resumed = counter("sessions_resumed_total", "Sessions continued with a resume token")
        self.refused = counter("sessions_refused_total", "Opens that were refused", ("code",))
        self.ended = counter("sessions_ended_total", "Sessions that ended", ("reason",))
        self.moved = counter("sessions_moved_total", "Times a session changed its editor", ("why",))
        self.session_seconds = histogram("session_seconds", "Length of a session", SESSION_BUCKETS)
        self.first_chunk = histogram(
            "first_chunk_seconds", "From open to the first edited chunk", LATENCY_BUCKETS
        )
        self.chunk_latency = histogram(
            "chunk_latency_seconds",
            "From a chunk's last source frame to its edited frames",
            LATENCY_BUCKETS,
        )
        self.deadlines = counter(
            "chunk_deadlines_total", "Chunks ready within one chunk's duration or not", ("met",)
        )
        self.stalls = counter("stalls_total", "Times the edited stream stood still")
        self.dropped = counter("frames_dropped_total", "Source frames dropped in live mode")
        self.frames = counter("frames_edited_total", "Frames edited")
        self.recomputed = histogram(
            "recomputed_share", "Share of a chunk's tokens that was recomputed", SHARE_BUCKETS
        )
        self.gpu_seconds = counter("gpu_seconds_total", "Seconds the accelerator worked")
        self.session_gpu = histogram(
            "session_gpu_seconds", "Seconds the accelerator worked for a session", SESSION_BUCKETS
        )
        # The editor's.
        self.editor_load = gauge("editor_load", "Share of an editor's time that is promised")
        self.editor_sessions = gauge("editor_sessions", "Streams open at an editor")
        self.editor_chunk = gauge(
            "editor_chunk_seconds", "What a chunk of the model's own size costs"
        )
        self.editor_queue = gauge("editor_queue", "Chunks that wait for the accelerator")

    def snapshot(self) -> Snapshot:
        return [metric for metric in self.registry.collect() if metric.samples]


class _Merged:
    def __init__(self, snapshots: Mapping[str, Snapshot]) -> None:
        self.snapshots = snapshots

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for process, metrics in sorted(self.snapshots.items()):
            for metric in metrics:
                out = merged.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                out.samples += [
                    sample._replace(labels={**sample.labels, "process": process})
                    for sample in metric.samples
                ]
        return merged.values()


def render(snapshots: Mapping[str, Snapshot]) -> bytes:
    """Prometheus text of every process."""
    registry = CollectorRegistry()
    registry.register(_Merged(snapshots))
    return generate_latest(registry)
