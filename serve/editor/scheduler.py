"""One worker thread for the accelerator: of the jobs that wait, the one due first runs next."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ran(Generic[T]):
    value: T
    wait_s: float
    run_s: float


@dataclass(order=True)
class _Job:
    due: float  # time.monotonic()
    number: int
    function: Callable[[], Any] = field(compare=False)
    answer: asyncio.Future[Any] = field(compare=False)
    asked: float = field(compare=False)
    limit_s: float = field(compare=False)


class Scheduler:
    """Runs functions on its thread, earliest due first; the event loop is never blocked.

    A job whose caller was cancelled before it started is not run. `busy_s` is the time spent
    inside jobs, `running_since` says when the job that runs now was started.
    """

    def __init__(self, name: str = "accelerator") -> None:
        self._jobs: list[_Job] = []
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._stopped = False
        self.busy_s = 0.0
        self._running: tuple[float, float] | None = None  # since when, and its limit
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(
        self, function: Callable[[], T], *, due: float, limit_s: float = math.inf
    ) -> Ran[T]:
        """Raises what `function` raises; it is stuck when it runs for longer than `limit_s`."""
        if self._stopped:
            raise RuntimeError("the scheduler was stopped")
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        job = _Job(due, next(self._numbers), function, loop.create_future(), now, limit_s)
        with self._wake:
            heapq.heappush(self._jobs, job)
            self._wake.notify()
        ran: Ran[T] = await job.answer
        return ran

    @property
    def stuck_s(self) -> float | None:
        """The limit that the job which runs now has exceeded, None while it has not."""
        running = self._running
        if running is None or time.monotonic() - running[0] <= running[1]:
            return None
        return running[1]

    @property
    def running_since(self) -> float | None:
        return self._running[0] if self._running else None

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def stop(self) -> None:
        """After the job that is running; those that wait are cancelled."""
        with self._wake:
            self._stopped = True
            for job in self._jobs:
                job.answer.get_loop().call_soon_threadsafe(job.answer.cancel)
            self._jobs.clear()
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._stopped:
                    self._wake.wait()
                if self._stopped:
                    return
                job = heapq.heappop(self._jobs)
            if job.answer.cancelled():
                continue
            started = time.monotonic()
            self._running = (started, job.limit_s)
            value: Any = None
            error: BaseException | None = None
            try:
                value = job.function()
            except BaseException as raised:  # handed to whoever asked
                error = raised
            self._running = None
            spent = time.monotonic() - started
            self.busy_s += spent
            ran = Ran(value, started - job.asked, spent)
            try:
                job.answer.get_loop().call_soon_threadsafe(_answer, job.answer, ran, error)
            except RuntimeError:
                continue  # the asker's event loop is closed: nobody waits


def _answer(future: asyncio.Future[Any], ran: Ran[Any], error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(ran)
