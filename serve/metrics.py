"""What an operator watches, as Prometheus metrics; one registry a process.

A scrape reaches one front only, so every process hands its numbers in (`snapshot`) and `render`
writes them all, told apart by the label `process`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric

LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
SESSION_BUCKETS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
SHARE_BUCKETS = tuple(n / 10 for n in range(1, 11))
KEPT_APART = 100  # of those that went last; older ones do not come back
WHO = ("tenant", "model")  # labels of what a session does

Readings = list[Metric]

disable_created_metrics()  # a second series for every counter, which nobody reads


class _Registry:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def snapshot(self) -> Readings:
        return [metric for metric in self.registry.collect() if metric.samples]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"liveedit_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"liveedit_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"liveedit_{name}", text, buckets=buckets, registry=self.registry)


class Metrics(_Registry):
    """A front's; `gpu_hour_cost` is what an hour of compute costs, in any currency, 0 for none."""

    def __init__(self, gpu_hour_cost: float = 0.0) -> None:
        super().__init__()
        self.gpu_hour_cost = gpu_hour_cost
        self.sessions = self._gauge("sessions", "Sessions that are connected")
        self.admitted = self._counter("sessions_admitted_total", "Sessions opened", *WHO)
        self.resumed = self._counter(
            "sessions_resumed_total", "Sessions continued with a resume token", *WHO
        )
        self.refused = self._counter(
            "sessions_refused_total", "Opens that were refused", "code", "tenant"
        )
        self.ended = self._counter("sessions_ended_total", "Sessions that ended", "reason", *WHO)
        self.moved = self._counter(
            "sessions_moved_total", "Times a session changed its editor", "why"
        )
        self.codec_queue = self._gauge(
            "codec_queue", "Images that are decoded or encoded, or wait for it"
        )
        self.session_seconds = self._histogram(
            "session_seconds", "Length of a session", SESSION_BUCKETS
        )
        self.session_gpu = self._histogram(
            "session_gpu_seconds", "Seconds of compute a session took", SESSION_BUCKETS
        )
        self.gpu_seconds = self._counter(
            "gpu_seconds_total", "Seconds of compute of all sessions", *WHO
        )
        self.connected = self._counter(
            "session_time_seconds_total", "Seconds that sessions were connected", *WHO
        )
        self.cost = self._counter(
            "cost_total", "What compute has cost, in the currency of gpu_hour_cost", *WHO
        )
        self.first_chunk = self._histogram(
            "first_chunk_seconds", "From open to the first edited chunk", LATENCY_BUCKETS
        )
        self.chunk_latency = self._histogram(
            "chunk_latency_seconds",
            "From a chunk's last source frame to its edited frames",
            LATENCY_BUCKETS,
        )
        self.deadlines = self._counter(
            "chunk_deadlines_total",
            "Live chunks ready within one chunk's duration, or not",
            *("met", *WHO),
        )
        self.stalls = self._counter("stalls_total", "Times an edited live stream stood still", *WHO)
        self.dropped = self._counter(
            "frames_dropped_total", "Source frames dropped, live only", *WHO
        )
        self.lowered = self._counter(
            "chunks_lowered_total", "Chunks edited less well than asked", "rung", *WHO
        )
        self.frames = self._counter("frames_edited_total", "Frames edited", *WHO)
        self.recomputed = self._histogram(
            "recomputed_share", "Share of a chunk's tokens that was recomputed", SHARE_BUCKETS
        )


class EditorMetrics(_Registry):
    """An editor's."""

    def __init__(self) -> None:
        super().__init__()
        self.load = self._gauge("editor_load", "Share of an editor's time that is promised")
        self.sessions = self._gauge("editor_sessions", "Streams open at an editor")
        self.rungs = self._gauge(
            "sessions_on_rung", "Sessions by how well they are edited, full is as asked", "rung"
        )
        self.chunk = self._gauge(
            "editor_chunk_seconds", "What a chunk of the model's own size costs"
        )
        self.queue = self._gauge("editor_queue", "Chunks that wait for the accelerator")
        self.busy = self._counter("editor_busy_seconds_total", "Seconds the accelerator has worked")
        # Absent where there is no GPU, or its driver says nothing.
        self.gpu_used = self._gauge("gpu_utilisation", "Share of time that the GPU is busy", "gpu")
        self.gpu_memory = self._gauge("gpu_memory_bytes", "Memory of the GPU that is used", "gpu")
        self.gpu_total = self._gauge("gpu_memory_total_bytes", "Memory of the GPU", "gpu")


class HubMetrics(_Registry):
    """The hub's: what is known of all processes together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._gauge("hub_bytes", "States and edited frames kept for resuming")
        self.max_bytes = self._gauge("hub_max_bytes", "What of that it keeps at most")
        self.records = self._gauge("hub_sessions", "Sessions that could be resumed")
        self.wanted = self._gauge("editors_wanted", "Editors that demand asks for")
        self.ready = self._gauge("editors_ready", "Editors that are warmed up")
        self.waiting = self._gauge("sessions_waiting", "Opens that wait for an editor")
        self.lost = self._counter(
            "processes_lost_total", "Replicas that went without being asked to", "kind"
        )
        self.holding = self._gauge(
            "model_editors", "Editors that hold a version of what clients choose", "name", "model"
        )
        self.share = self._gauge(
            "model_share", "Of new sessions with this name, for this version", "name", "model"
        )
        self.failed = self._gauge(
            "model_failed", "1 for a version that could not be loaded and takes nothing", "model"
        )
        self.build = self._gauge("build_info", "1, for what runs here", "version", "ray", "model")


COUNTED = ("counter", "histogram")  # types whose numbers stay true when their process is gone


class GoneProcesses:
    """What processes that are gone have counted: without it a sum over processes would fall."""

    def __init__(self) -> None:
        self._last: dict[str, Readings] = {}  # in order of their going
        self._folded: Readings = []

    def add(self, process: str, metrics: Readings) -> None:
        self._last[process] = [metric for metric in metrics if metric.type in COUNTED]
        while len(self._last) > KEPT_APART:
            self._folded = _sum(self._folded, self._last.pop(next(iter(self._last))))

    def back(self, process: str) -> None:
        """It was only silent, and counts for itself again."""
        self._last.pop(process, None)

    def snapshot(self) -> Readings:
        total = self._folded
        for metrics in self._last.values():
            total = _sum(total, metrics)
        return total


def _sum(one: Readings, other: Readings) -> Readings:
    """Metric by metric, series by series."""
    summed = {metric.name: metric for metric in one}
    for metric in other:
        values = {(s.name, tuple(s.labels.items())): s for s in metric.samples}
        for sample in summed[metric.name].samples if metric.name in summed else ():
            key = (sample.name, tuple(sample.labels.items()))
            value = sample.value + (values[key].value if key in values else 0.0)
            values[key] = sample._replace(value=value)
        total = Metric(metric.name, metric.documentation, metric.type)
        total.samples = list(values.values())
        summed[metric.name] = total
    return list(summed.values())


class _Merged:
    def __init__(self, snapshots: Mapping[str, Readings]) -> None:
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


def render(snapshots: Mapping[str, Readings]) -> bytes:
    """Prometheus text of every process."""
    registry = CollectorRegistry()
    registry.register(_Merged(snapshots))
    return generate_latest(registry)
