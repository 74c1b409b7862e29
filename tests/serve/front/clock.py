"""A clock that only moves when the test says so, for everything that waits by asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")

SOON = 1e-6  # seconds: less than anything in `serve` waits


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its clock does not run: it jumps to what is due next when nothing else is left to do.

    Good for code without threads and sockets, which it would not wait for.
    """

    def __init__(self) -> None:
        self.clock = 100.0
        super().__init__()
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None) -> Any:
            assert timeout is not None, "nothing is left that could ever happen"
            self.clock += timeout
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.clock


class Clock:
    """A loop whose time is `time.monotonic()` too, from `start` to `stop`."""

    def start(self) -> None:
        self.loop = JumpingLoop()
        self._patch = patch("time.monotonic", self.loop.time)
        self._patch.start()

    def stop(self) -> None:
        try:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.advance(1.0)
        finally:
            self._patch.stop()
            self.loop.close()

    def __enter__(self) -> Clock:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def now(self) -> float:
        return self.loop.time()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    def task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self.loop.create_task(coroutine)

    def settle(self) -> None:
        """Until nothing can happen without time going by."""
        self.run(asyncio.sleep(SOON))

    def advance(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))
        self.settle()
