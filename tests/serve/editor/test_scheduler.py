from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from serve.editor.scheduler import Scheduler

pytestmark = pytest.mark.anyio


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    running = Scheduler()
    yield running
    running.stop()


async def test_the_job_due_first_runs_next_and_never_on_the_event_loop(
    scheduler: Scheduler,
) -> None:
    order: list[str] = []
    gate = threading.Event()
    blocker = asyncio.create_task(scheduler.run(partial(gate.wait, 10), due=0.0))
    while scheduler.running_since is None:
        await asyncio.sleep(0.001)

    def job(name: str) -> str:
        assert threading.current_thread() is not threading.main_thread()
        order.append(name)
        return name

    jobs = [
        asyncio.create_task(scheduler.run(partial(job, name), due=due))
        for name, due in (("late", 30.0), ("soon", 10.0), ("middle", 20.0), ("soon too", 10.0))
    ]
    await asyncio.sleep(0)
    gate.set()
    done = await asyncio.gather(blocker, *jobs)
    assert order == ["soon", "soon too", "middle", "late"]
    assert [ran.value for ran in done[1:]] == ["late", "soon", "middle", "soon too"]
    assert all(ran.wait_s >= 0 and ran.run_s >= 0 for ran in done)


class Time:
    now = 50.0

    def monotonic(self) -> float:
        return self.now


async def test_what_a_job_waited_and_took_and_all_of_them_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Time()
    monkeypatch.setattr("serve.editor.scheduler.time", clock)
    scheduler = Scheduler()
    gate = threading.Event()

    def job(seconds: float, wait: threading.Event | None = None) -> None:
        if wait is not None:
            wait.wait(10)
        clock.now += seconds

    first = asyncio.create_task(scheduler.run(partial(job, 2.0, gate), due=0.0))
    while scheduler.running_since is None:
        await asyncio.sleep(0.001)
    assert scheduler.running_since == 50.0
    clock.now += 1.0
    second = asyncio.create_task(scheduler.run(partial(job, 0.5), due=1.0))
    await asyncio.sleep(0)
    gate.set()
    ran = [await first, await second]
    assert [(r.wait_s, r.run_s) for r in ran] == [(0.0, 3.0), (2.0, 0.5)]
    assert scheduler.busy_s == 3.5
    assert scheduler.running_since is None
    scheduler.stop()


async def test_a_job_nobody_waits_for_is_not_run(scheduler: Scheduler) -> None:
    gate, ran = threading.Event(), threading.Event()
    blocker = asyncio.create_task(scheduler.run(partial(gate.wait, 10), due=0.0))
    given_up = asyncio.create_task(scheduler.run(ran.set, due=1.0))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    gate.set()
    await blocker
    await scheduler.run(int, due=2.0)
    assert not ran.is_set()


async def test_an_error_reaches_its_asker_and_the_thread_goes_on(scheduler: Scheduler) -> None:
    def broken() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await scheduler.run(broken, due=0.0)
    assert (await scheduler.run(lambda: 7, due=0.0)).value == 7


async def test_stopping_cancels_what_waits(scheduler: Scheduler) -> None:
    gate = threading.Event()
    blocker = asyncio.create_task(scheduler.run(partial(gate.wait, 10), due=0.0))
    waiting = asyncio.create_task(scheduler.run(int, due=1.0))
    while scheduler.running_since is None:
        await asyncio.sleep(0.001)
    scheduler.stop()
    gate.set()
    await blocker
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(waiting, 20)
    with pytest.raises(RuntimeError, match="stopped"):
        await scheduler.run(int, due=0.0)


def test_a_scheduler_that_is_stopped_keeps_no_thread() -> None:
    scheduler = Scheduler()
    scheduler.stop()
    scheduler._thread.join(20)
    assert not scheduler._thread.is_alive()


async def test_time_that_ends_in_an_error_was_worked_too(scheduler: Scheduler) -> None:
    def fail() -> None:
        began = time.monotonic()  # here, since the thread may have waited for its turn
        while time.monotonic() < began + 0.02:
            pass
        raise ValueError("the device said no")

    with pytest.raises(ValueError, match="said no"):
        await scheduler.run(fail, due=0.0)
    assert scheduler.busy_s > 0.01


def test_an_asker_whose_loop_is_gone_stops_nobody_else() -> None:
    scheduler, gate = Scheduler(), threading.Event()

    async def ask() -> None:
        asked = asyncio.create_task(scheduler.run(partial(gate.wait, 10), due=0.0))
        while scheduler.running_since is None:
            await asyncio.sleep(0.001)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    async def ask_again() -> int:
        return (await asyncio.wait_for(scheduler.run(lambda: 7, due=0.0), 5)).value

    asyncio.run(ask())
    gate.set()
    assert asyncio.run(ask_again()) == 7
    scheduler.stop()
