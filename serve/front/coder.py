"""A session's edited frames to images, as soon as they are here and beside each other."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from serve.wire import codec
from serve.wire.protocol import Format

CORES = os.cpu_count() or 1
PIECE = 2**17  # pixels to encode below which a second thread costs more than it saves


@dataclass(frozen=True)
class Coded:
    images: list[bytes]
    begun: float  # time.monotonic()
    done: float


class FrameCoder:
    """Uses threads of `codecs`, for one chunk at most as many as there are cores."""

    def __init__(self, codecs: Executor, format: Format) -> None:
        self._codecs, self._format = codecs, format
        self._begun: deque[tuple[np.ndarray, asyncio.Task[Coded]]] = deque()

    def begin(self, frames: np.ndarray) -> None:
        """Those that will be asked for, uint8 [n, height, width, 3], if their editor lives."""
        self._begun.append((frames, asyncio.create_task(self._encode(frames))))

    async def images(self, frames: np.ndarray) -> Coded:
        """Of frames that were begun or not; what was begun before them is not asked for again."""
        while self._begun:
            begun, coding = self._begun.popleft()
            if begun is frames:
                return await coding
            coding.cancel()  # of an editor that is gone
        return await self._encode(frames)

    def close(self) -> None:
        for _, coding in self._begun:
            coding.cancel()

    async def _encode(self, frames: np.ndarray) -> Coded:
        loop, begun = asyncio.get_running_loop(), time.monotonic()
        pieces = min(CORES, len(frames), frames[..., 0].size // PIECE)
        encoding = [
            loop.run_in_executor(self._codecs, _encode_all, piece, self._format)
            for piece in np.array_split(frames, max(1, pieces))
        ]
        images = [image for piece in await asyncio.gather(*encoding) for image in piece]
        return Coded(images, begun, time.monotonic())


def _encode_all(frames: np.ndarray, format: Format) -> list[bytes]:
    return [codec.encode(frame, format) for frame in frames]
