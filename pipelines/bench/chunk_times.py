"""Where the time of a chunk goes, read off the real calls that a stream makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling.editor import StreamingEditor
from modeling.streaming.device import DeviceClock
from modeling.streaming.stream import EditStream

DETAIL = ("resize", "following", "transfer")  # the editor's; without detail only the first


@dataclass(frozen=True)
class ChunkTimes:
    """One chunk, in milliseconds."""

    encode: float  # VAE encoder
    # D: all that the device does for the chunk but encode, decode and detail: with a blurred guide
    # also its blur and the gate after it, about a millisecond of a GPU's
    transformer: float
    decode: float  # VAE decoder, of the edit
    detail: float  # resizing, the guide but for its blur, and the transfer
    answer: float  # from `push` to edited frames
    whole: float  # V: the chunk's share of the time that a run of chunks takes
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
        """While entered, the editor's VAE and its work on pictures mark when they start and end."""
        watched = [
            (self._editor.vae, "encode"), (self._editor.vae, "decode"),
            *((self._editor, part) for part in DETAIL),
        ]  # fmt: skip
        before = [owner.__dict__.get(name) for owner, name in watched]
        for owner, name in watched:
            setattr(owner, name, self._marked(name, getattr(owner, name)))
        try:
            yield
        finally:
            for (owner, name), own in zip(watched, before, strict=True):
                if own is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)

    def push(self, stream: EditStream) -> ChunkTimes:
        """One chunk alone: `whole` ends when the device is free again."""
        return self.run(stream, 1)[0]

    def run(self, stream: EditStream, count: int) -> list[ChunkTimes]:
        """`count` chunks, each pushed at once, as soon as the edit of the one before is there.

        A GPU still refreshes its caches when it has answered, so the next chunk pays for that;
        the first one is charged with what remains when the last has answered.
        """
        parts, answers, wholes, told = [], [], [], []
        self._wait()
        began = last = time.perf_counter()
        for _ in range(count):
            frames = self._source[: stream.wanted_frames]
            self._calls = []
            pushed = time.perf_counter()
            (chunk,) = stream.push(frames)
            now = time.perf_counter()
            parts.append((self._calls, self._clock.mark()))
            answers.append((now - pushed) * 1000)
            wholes.append((now - last) * 1000)
            told.append(chunk)
            last = now
        self._wait()
        wholes[0] += (time.perf_counter() - began) * 1000 - sum(wholes)
        times = []
        for (calls, end), answer, whole, chunk in zip(parts, answers, wholes, told, strict=True):
            decodings = self._spans(calls, "decode")
            encode, decode = sum(self._spans(calls, "encode")), decodings[0]
            detail = sum(decodings[1:]) + sum(sum(self._spans(calls, part)) for part in DETAIL)
            span = self._clock.between(calls[0][1], end)
            times.append(
                ChunkTimes(
                    encode=encode,
                    transformer=span - encode - decode - detail,
                    decode=decode,
                    detail=detail,
                    answer=answer,
                    whole=whole,
                    recomputed=chunk.recomputed,
                    index=chunk.index,
                )
            )
        return times

    def last_frame(self, stream: EditStream) -> float:
        """Milliseconds from a chunk's last frame to its first edited one, the others being in."""
        frames = self._source[: stream.wanted_frames]
        early = list(stream.push(frames[:-1]))
        assert not early
        self._wait()
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

    def _spans(self, calls: list[tuple[str, Any, Any]], name: str) -> list[float]:
        spans = [self._clock.between(start, end) for call, start, end in calls if call == name]
        assert spans or name in DETAIL[1:], f"EditStream edited a chunk without {name}"
        return spans

    def _wait(self) -> None:
        self._clock.wait(self._clock.mark())
