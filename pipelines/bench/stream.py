"""How fast a stream is edited: D, E and V of a chunk, start-up, memory, concurrent sessions.

D is the transformer alone (denoising steps, refresh, cache commit, mask), E adds VAE decoding,
detail is what a working size costs beside the networks, V is everything that `EditStream.push` does
from uint8 frames to uint8 frames. All are taken from the same pushes through the public interface,
with a full window, after warm-up.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from modeling.config import MaskCacheConfig
from modeling.editor import StreamingEditor
from modeling.streaming.stream import EditStream
from pipelines.bench import SCHEMA
from pipelines.bench.check import ratios, require_same_work
from pipelines.bench.chunk_times import ChunkTimer, ChunkTimes
from pipelines.bench.machine import Memory, hardware, weights_gib, yardstick
from pipelines.bench.subject import (
    BenchOptions,
    build_editor,
    describe,
    noise_frames,
    plain_editor,
)

WARM_UP = 2  # chunks after the window is full that are not counted
PLAIN_CHUNKS = 6

Note = Callable[[str], None]


def measure(
    options: BenchOptions,
    stored: dict[str, Any] | None = None,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """The whole report but its command line, as JSON values; `note` hears what is going on.

    UserError, before anything is timed, if the work is not that of the `stored` report.
    """
    note("building the model")
    began = time.perf_counter()
    editor = build_editor(options)
    load_s = time.perf_counter() - began
    bench = StreamBench(editor, options, note)
    report = {
        "schema": SCHEMA,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": describe(editor, options, bench.size),
        "hardware": hardware(editor.device),
        "load_s": load_s,
    }
    if stored is not None:
        require_same_work(report, stored)
    with bench.timer.watch():
        return report | bench.run()


class StreamBench:
    """One benchmark run; the parts share the editor and its compiled code."""

    def __init__(self, editor: StreamingEditor, options: BenchOptions, note: Note) -> None:
        settings = editor.settings
        self.editor, self.options, self.note = editor, options, note
        self.size = options.size or (settings.height, settings.width)
        self.source = noise_frames(settings.chunk_frames, *self.size)
        self.timer = ChunkTimer(editor, self.source)
        self.memory = Memory(editor.device)
        self.run_in = settings.window_latents // settings.chunk_latents + WARM_UP
        self.variants: dict[str, MaskCacheConfig | None] = {"dense": None}
        if editor.mask_cache:
            self.variants["mask cache"] = editor.mask_cache

    def run(self) -> dict[str, Any]:
        main = list(self.variants)[-1]  # what a user of this model gets
        self.note("first stream: compiling and capturing where the device does")
        cold = self._start(main)[1]
        self._free()
        self.memory.reset()
        self.note("second stream")
        stream, warm = self._start(main)
        one_stream, held = self.memory.peak(), self.memory.held()
        streams = {name: stream if name == main else self._start(name)[0] for name in self.variants}
        variants = self._time_variants(streams)
        streams.clear()
        del stream
        self._free()
        measured = {
            "variants": variants,
            "plain": self.time_plain(),
            "start": {"cold": cold, "warm": warm},
            "memory": {
                "measure": self.memory.measure,
                "weights_gib": weights_gib(self.editor.transformer, self.editor.vae),
                "one_stream_gib": one_stream,
                "held_gib": held,
            },
            "sessions": self._sessions(main),
            "yardstick": yardstick(self.editor.device),
        }
        return measured | {"ratios": ratios(measured)}

    def _start(self, name: str) -> tuple[EditStream, dict[str, float]]:
        """A stream with a full window, warm, and how it came up (milliseconds)."""
        began = time.perf_counter()
        stream = self._open(self.editor, self.variants[name])
        self.timer.push(stream)
        first_ms = (time.perf_counter() - began) * 1000
        rest = [self.timer.push(stream).whole for _ in range(self.run_in - 1)]
        return stream, {
            "first_chunk_ms": first_ms,
            "slowest_next_ms": max(rest),
            "chunks": len(rest),
        }

    def _open(self, editor: StreamingEditor, mask_cache: MaskCacheConfig | None) -> EditStream:
        return editor.open(
            "make it blue",
            height=self.size[0],
            width=self.size[1],
            work_size=self.options.work_size,
            detail=self.options.detail,
            mask_cache=mask_cache,
        )

    def _time_variants(self, streams: dict[str, EditStream]) -> dict[str, Any]:
        """Each variant in two halves, taken in turn, so that a drift shows as spread."""
        half = -(-self.options.chunks // 2)
        passes: dict[str, list[list[ChunkTimes]]] = {name: [] for name in streams}
        for turn in (1, 2):
            for name, stream in streams.items():
                self.note(f"{name}, {half} chunks, pass {turn} of 2")
                passes[name].append(self.timer.run(stream, half))
        last_frame = {
            name: [self.timer.last_frame(stream) for _ in range(half)]
            for name, stream in streams.items()
        }
        frames = self.editor.settings.chunk_frames
        return {
            name: summary(passes[name], frames) | {"last_frame": percentiles(last_frame[name])}
            for name in streams
        }

    def time_plain(self) -> dict[str, Any] | None:
        """The dense stream without the GPU's fast path; None where there is no other path."""
        if not self.editor.accelerated:
            return None
        self.note("plain path")
        plain = plain_editor(self.editor)
        timer = ChunkTimer(plain, self.source)
        stream = self._open(plain, None)
        with timer.watch():
            timer.run(stream, self.run_in)
            times = timer.run(stream, PLAIN_CHUNKS)
        del plain, timer, stream
        self._free()
        return summary([times], self.editor.settings.chunk_frames)

    def _sessions(self, name: str) -> dict[str, Any]:
        """How many live streams one device serves: one more at a time until one is late."""
        settings = self.editor.settings
        period = settings.chunk_frames / settings.fps * 1000
        rounds = -(-self.options.chunks // 2)
        tried: list[dict[str, Any]] = []
        streams: list[EditStream] = []
        self.memory.reset()
        while len(streams) < self.options.sessions and all(entry["holds"] for entry in tried):
            count = len(streams) + 1
            self.note(f"{count} concurrent sessions")
            try:
                streams.append(self._start(name)[0])
                latencies = in_real_time(
                    lambda session: self.timer.push(streams[session]),
                    sessions=count,
                    rounds=rounds,
                    period=period,
                )
            except torch.OutOfMemoryError:
                tried.append({"sessions": count, "holds": False, "out_of_memory": True})
                break
            times = percentiles(latencies)
            tried.append(
                {
                    "sessions": count,
                    "holds": times["p99_ms"] <= period,
                    **times,
                    "late": float(np.mean(np.array(latencies) > period)),
                    "memory_gib": self.memory.peak(),
                }
            )
        held = max((entry["sessions"] for entry in tried if entry["holds"]), default=0)
        return {"variant": name, "deadline_ms": period, "held": held, "tried": tried}

    def _free(self) -> None:
        """Let go of closed streams, whose graphs and caches may hang in reference cycles."""
        gc.collect()
        if self.editor.device.type == "cuda":
            torch.cuda.empty_cache()


def in_real_time(
    push: Callable[[int], ChunkTimes], *, sessions: int, rounds: int, period: float
) -> list[float]:
    """Latencies (ms) of chunks that all sessions complete at the same moments, the worst case.

    `push` edits a session's next chunk. The device takes chunks in the order they come; only the
    time in which it would wait for frames is skipped.
    """
    clock, latencies = 0.0, []
    for turn in range(rounds):
        ready = turn * period
        for session in range(sessions):
            began = max(clock, ready)
            times = push(session)
            latencies.append(began + times.answer - ready)
            clock = began + times.whole
    return latencies


def percentiles(times: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def summary(passes: list[list[ChunkTimes]], frames: int) -> dict[str, Any]:
    """Percentiles of one variant's chunks, and how far apart the medians of its passes are."""
    chunks = [chunk for one in passes for chunk in one]
    parts: dict[str, Callable[[ChunkTimes], float]] = {
        "encode": lambda c: c.encode,
        "D": lambda c: c.transformer,
        "decode": lambda c: c.decode,
        "detail": lambda c: c.detail,
        "E": lambda c: c.transformer + c.decode,
        "V": lambda c: c.whole,
    }
    result: dict[str, Any] = {}
    for name, part in parts.items():
        times = percentiles([part(c) for c in chunks])
        medians = [float(np.median([part(c) for c in one])) for one in passes]
        result[name] = {
            **times,
            "fps": frames / times["p50_ms"] * 1000,
            "spread": (max(medians) - min(medians)) / times["p50_ms"],
        }
    result["recomputed"] = float(np.median([c.recomputed for c in chunks]))
    result["chunks"] = [
        {
            "encode": c.encode, "D": c.transformer, "decode": c.decode, "detail": c.detail,
            "V": c.whole,
        }
        for c in chunks
    ]  # fmt: skip
    return result
