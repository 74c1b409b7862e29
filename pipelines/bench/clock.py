"""Where the time of a chunk goes, read off the real calls that a stream makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modeling.editor import StreamingEditor
from modeling.stream import EditStream


class DeviceClock:
    """Marks in the device's own order of work: CUDA events on a GPU, the clock on a CPU.

    Marking does not wait for the device, so that timing a part leaves the whole as fast as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds; on a GPU only after `synchronize`."""
        return float(start.elapsed_time(end) if self._cuda else (end - start) * 1000)

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class ChunkTimes:
    """One chunk, in milliseconds."""

    encode: float  # VAE encoder
    transformer: float  # D: from the encoder's end to the decoder's start
    decode: float  # VAE decoder
    whole: float  # V: `push` and `next`, frames in to frames out
    recomputed: float  # share of tokens, not a time
    index: int


class ChunkTimer:
    """Pushes chunks into streams of one editor and splits their time at the VAE's calls."""

    def __init__(self, editor: StreamingEditor, source: np.ndarray) -> None:
        self._editor = editor
        self._source = source  # uint8 [chunk frames, H, W, 3]
        self._clock = DeviceClock(editor.device)
        self._calls: list[tuple[str, Any, Any]] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """While entered, the editor's VAE marks when it starts and ends."""
        vae = self._editor.vae
        before = {name: vae.__dict__.get(name) for name in ("encode", "decode")}
        for name in before:
            setattr(vae, name, self._marked(name, getattr(vae, name)))
        try:
            yield
        finally:
            for name, own in before.items():
                if own is None:
                    delattr(vae, name)
                else:
                    setattr(vae, name, own)

    def push(self, stream: EditStream) -> ChunkTimes:
        """Feed the frames of one chunk at once and wait for their edit."""
        frames = self._source[: stream.wanted_frames]
        self._calls.clear()
        self._clock.synchronize()
        began = time.perf_counter()
        (chunk,) = stream.push(frames)
        whole = (time.perf_counter() - began) * 1000
        self._clock.synchronize()
        encode, decode = self._total("encode"), self._total("decode")
        span = self._clock.between(self._calls[0][1], self._calls[-1][2])
        transformer = span - encode - decode
        return ChunkTimes(encode, transformer, decode, whole, chunk.recomputed, chunk.index)

    def last_frame(self, stream: EditStream) -> float:
        """Milliseconds from a chunk's last frame to its first edited one, the others being in."""
        frames = self._source[: stream.wanted_frames]
        early = list(stream.push(frames[:-1]))
        assert not early
        self._clock.synchronize()
        began = time.perf_counter()
        next(stream.push(frames[-1:]))
        return (time.perf_counter() - began) * 1000

    def _marked(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            start = self._clock.mark()
            result = call(*args, **kwargs)
            self._calls.append((name, start, self._clock.mark()))
            return result

        return marked

    def _total(self, name: str) -> float:
        spans = [
            self._clock.between(start, end) for call, start, end in self._calls if call == name
        ]
        assert spans, f"EditStream edited a chunk without editor.vae.{name}"
        return sum(spans)
