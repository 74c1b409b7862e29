"""When an editor's chunks are due on the accelerator."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from serve.editor.engine import Engine
from serve.editor.stream import FURTHEST_S, EditorStream
from serve.wire.work import Opening, SupersededError, Take, Work
from tests.serve.editor.works import WORKS, Source, replaced, work

pytestmark = pytest.mark.anyio


class Time:
    """What `due` takes for the time."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr("serve.editor.stream.time", made)
    return made


async def dues(engine: Engine, opening: Opening, take: Take) -> list[float]:
    """When each job of a stream was due, in the order in which they were asked for."""
    asked: list[float] = []
    run = engine.scheduler.run

    def record(function: Any, *, due: float, **named: Any) -> Any:
        asked.append(due)
        return run(function, due=due, **named)

    engine.scheduler.run = record  # type: ignore[method-assign]
    async for _ in engine.edit(opening, take):
        pass
    return asked


PATIENCE = [("live", 12.0, 1.0), ("live", 24.0, 0.5), ("live", 6.0, 2.0), ("lossless", 12.0, 5.0)]


GIVEN = [*WORKS[:3], work(2, 21, 0, last=True)]  # 9, 4 ahead, 8 and 0 frames


@pytest.mark.parametrize(("mode", "fps", "patience"), PATIENCE)
@pytest.mark.parametrize("faster", [0.5, 1.0, 1.09])
async def test_a_live_chunk_is_due_when_the_next_is_there(
    engine: Engine, clock: Time, mode: Any, fps: float, patience: float, faster: float
) -> None:
    """Within a chunk's time, and frames ahead of theirs within two. What opens comes first."""
    source, came = Source(*GIVEN), list[float]()

    async def take() -> Work:
        if came:  # a frame, or as many as it has just sent, before the next
            clock.now += len(GIVEN[len(came) - 1].frames) / fps / faster
        came.append(clock.now)
        return await source.take()

    asked = await dues(engine, replaced(mode=mode, fps=fps), take)
    ahead = 2 * patience if mode == "live" else patience
    more = np.array([patience, ahead, patience, patience])
    wanted = np.array(came) + more
    assert asked == pytest.approx([0.0, *wanted])


@pytest.mark.parametrize(("mode", "fps", "patience"), PATIENCE)
async def test_who_sends_faster_than_it_said_is_due_when_it_said(
    engine: Engine, clock: Time, mode: Any, fps: float, patience: float
) -> None:
    """All at once: each job counts from when its frames would come, a tenth faster at most."""
    asked = await dues(engine, replaced(mode=mode, fps=fps), Source(*GIVEN).take)
    ahead = 2 * patience if mode == "live" else patience
    turns = 1000.0 + np.array([0, 9, 13, 21]) / (1.1 * fps)
    wanted = turns + np.array([patience, ahead, patience, patience])
    assert asked == pytest.approx([0.0, *wanted])


async def test_who_is_ended_gets_nothing_more_though_it_was_ready_then() -> None:
    stream = EditorStream("s", replaced(mode="live"), 12)

    async def ready() -> int:
        stream.end(SupersededError())
        return 7

    with pytest.raises(SupersededError):
        await stream.until(ready())
    stream.close()


async def test_what_who_is_ended_waited_for_is_given_up() -> None:
    """A job that has not begun is then never run."""
    stream, given_up = EditorStream("s", replaced(mode="live"), 12), asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    waiting = asyncio.create_task(stream.until(wait()))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not given_up.is_set()
    stream.end(SupersededError())
    with pytest.raises(SupersededError):
        await waiting
    async with asyncio.timeout(5):
        await given_up.wait()
    stream.close()


async def test_nobody_is_put_back_for_ever(clock: Time) -> None:
    stream = EditorStream("s", replaced(mode="live", fps=1.0), 12)
    for _ in range(20):
        stream.due(12, 1.0)
    assert stream.due(12, 1.0) == pytest.approx(1000.0 + FURTHEST_S + 12.0)
    stream.close()
