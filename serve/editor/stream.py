"""A stream at its editor: when it is its turn, how long a job of it may run, how it is ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from serve.admission.rungs import LOSSLESS_PATIENCE, Rung
from serve.editor.scheduler import Ran, Scheduler
from serve.wire.work import Opening

STUCK_S = 120.0  # that a job may run
STUCK_TIMES = 10.0  # and so many times what its chunk is thought to cost: long is not stuck
TOLERANCE = 1.1  # by which a source may be faster than it said
IDLE_TICK_S = 0.02
FURTHEST_S = 10.0  # that who sends faster than it said is put back at most

T = TypeVar("T")


class EditorStream:
    """`name` is what it is counted in by, `asked` its number among those asked for."""

    def __init__(self, name: str, opening: Opening, chunk_frames: int, asked: int = 0) -> None:
        self.name, self.opening, self.asked = name, opening, asked
        self.rung: Rung | None = None  # how its chunk is edited, since `changed`
        self.changed = False  # the next chunk is the first of its rung
        self.edited = 0  # chunks, here
        self.running = False  # a job of it is on the accelerator
        self._turn = 0.0  # time.monotonic(): when its next frames would come at its own rate
        self._chunk_frames = chunk_frames
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, error: Exception) -> None:
        """Whatever it waits for raises `error` instead."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def until(self, awaited: Coroutine[Any, Any, T]) -> T:
        """What `awaited` returns, or what `end` was called with, whichever comes first."""
        task = asyncio.create_task(awaited)
        try:
            waiting: set[asyncio.Future[Any]] = {task, self._ended}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                self._ended.result()
            return task.result()
        finally:
            task.cancel()

    def due(self, frames: int, chunks: float) -> float:
        """When a job with so many frames is due: a live stream's in `chunks` lengths of a chunk.

        Due times count from the stream's turn. So one that sends more than it was admitted for gets
        what the others leave, and two lossless ones share that.
        """
        now, fps = time.monotonic(), self.opening.fps
        turn = min(max(now, self._turn), now + FURTHEST_S)
        self._turn = turn + frames / (TOLERANCE * fps)
        live = chunks * self._chunk_frames / fps
        return turn + (live if self.opening.mode == "live" else LOSSLESS_PATIENCE)

    async def run(
        self, scheduler: Scheduler, function: Callable[[], T], *, due: float, cost_s: float
    ) -> Ran[T]:
        """On the accelerator; `cost_s` is what a chunk is thought to cost."""

        def job() -> T:
            self.running = True
            try:
                return function()
            finally:
                self.running = False

        limit = max(STUCK_S, STUCK_TIMES * cost_s)
        return await self.until(scheduler.run(job, due=due, limit_s=limit))

    async def idle(self) -> None:
        """Returns when no job of it is on the accelerator, which cannot be taken off it."""
        while self.running:
            await asyncio.sleep(IDLE_TICK_S)

    def close(self) -> None:
        self._ended.cancel()
