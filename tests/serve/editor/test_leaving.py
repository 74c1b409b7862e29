"""What an editor gives back when it leaves or all is done, and on which rung it edits."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from modeling.streaming.state import StreamState
from modeling.streaming.stream import EditStream
from serve.admission.admission import Warm
from serve.admission.rungs import FULL, Rung
from serve.editor.engine import ROLLING, Engine
from serve.wire.work import Edited, Moved, Ready, Work
from tests.known_editors import assert_edited
from tests.serve.editor.works import (
    OPENING,
    RED,
    SIZES,
    SOURCE,
    WORKS,
    Source,
    chunks,
    events,
    filling,
    replaced,
    together,
    work,
)  # fmt: skip

pytestmark = pytest.mark.anyio


async def given_back(engine: Engine, reasons: tuple[str, ...], *works: Work) -> list[Any]:
    """With the last of `works` it is told to leave, in the moment in which it takes it."""
    source = Source(*works)

    async def take() -> Work:
        found = await source.take()
        if not source.works:
            for reason in reasons:
                engine.leave(reason)
        return found

    async with aclosing(engine.edit(OPENING, take)) as given:
        return [event async for event in together(given)]


async def test_what_was_taken_while_it_leaves_is_edited(engine: Engine) -> None:
    ready, first, second, moved = await given_back(engine, ("drain",), *WORKS[:3])
    assert isinstance(ready, Ready)
    assert [len(chunk.frames) for chunk in (first, second)] == [9, 12]
    assert moved == Moved(moved.state, 0, "drain")


async def test_who_leaves_asks_for_nothing_any_more(engine: Engine) -> None:
    """What came to it then would be lost: the front gives it to the next editor."""
    asked, given_up = asyncio.Event(), asyncio.Event()

    async def take() -> Work:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()
        raise AssertionError

    async with asyncio.timeout(30), aclosing(engine.edit(OPENING, take)) as given:
        await anext(given)
        moving = asyncio.ensure_future(anext(given))
        await asked.wait()
        assert not given_up.is_set()
        engine.leave()
        assert isinstance(await moving, Moved)
        await given_up.wait()


@pytest.mark.parametrize(
    ("reasons", "why", "ahead"),
    [
        (("drain",), "drain", 4),
        ((ROLLING,), ROLLING, 0),
        # The first word holds: a stream that was promised its exact state gets it.
        (("drain", ROLLING), "drain", 4),
        ((ROLLING, "drain"), ROLLING, 0),
    ],
)
async def test_why_it_leaves_decides_what_the_state_holds(
    engine: Engine, reasons: tuple[str, ...], why: str, ahead: int
) -> None:
    """All, for an editor of the same version; for another only what that can go on from, which
    is no frame of a chunk that is not complete."""
    *_, moved = await given_back(engine, reasons, *WORKS[:2])
    assert (moved.why, moved.ahead) == (why, ahead)
    state = StreamState.from_bytes(moved.state.rest)
    assert (len(state.pending), state.kv is None) == (ahead, why == ROLLING)


async def test_a_last_work_without_frames_has_an_answer(engine: Engine) -> None:
    run = engine.scheduler.run

    async def waited(*args: Any, **named: Any) -> Any:
        return replace(await run(*args, **named), wait_s=0.25, run_s=0.125)

    engine.scheduler.run = waited  # type: ignore[method-assign]
    _, _, last = await events(engine, OPENING, WORKS[0], work(1, 9, 0, last=True))
    assert (last.number, last.index, last.frames.shape) == (1, 1, (0, 32, 48, 3))
    assert (last.wait_ms, last.recomputed, last.steps, last.device_s, last.state) == (
        250,
        0.0,
        0,
        0.0,
        None,
    )


async def test_what_is_left_of_a_chunk_at_the_end_is_edited(engine: Engine) -> None:
    _, _, last = await events(engine, OPENING, WORKS[0], work(1, 9, 5, last=True))
    assert_edited(last.frames[:4], SOURCE[9:13], RED)
    assert (last.number, last.index, len(last.frames), last.state) == (1, 1, 5, None)


async def test_a_rung_holds_for_a_chunk_and_its_first_says_nothing_of_its_cost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ladder decides whenever it likes: for the chunk that has begun nothing changes."""
    full, low = Rung(FULL, (32, 48)), Rung("steps", (32, 48), halved=True)
    now, changes, seen = full, list[int](), list[Any]()
    change = EditStream.change

    def changed(self: EditStream, quality: Any) -> None:
        changes.append(self.chunks)
        change(self, quality)

    def noted(sizes: Any, seconds: float, name: str | None = None) -> None:
        seen.append(sizes)

    monkeypatch.setattr(EditStream, "change", changed)
    monkeypatch.setattr(engine.capacity, "rung", lambda name: now)
    monkeypatch.setattr(engine.capacity, "observe", noted)
    source, taken = Source(*WORKS[:5], work(2, 29, 4), work(3, 0, 12, last=True)), 0
    rungs = {1: low, 2: full, 4: low, 5: full, 6: low}  # by how many works were taken before

    async def take() -> Work:
        nonlocal now, taken
        now = rungs.get(taken, now)
        taken += 1
        return await source.take()

    async with aclosing(engine.edit(replaced(mode="live"), take)) as given:
        edited = [event async for event in given if isinstance(event, Edited)]
    # The second was low from its first frame on, the third full, the last low again.
    assert [(chunk.rung, chunk.steps) for chunk in edited] == [
        (FULL, 4), ("steps", 2), (FULL, 4), ("steps", 2)
    ]  # fmt: skip
    assert changes == [1, 2, 3]
    assert seen == [SIZES]


async def test_what_a_rung_costs_is_kept_as_its_own(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, seen = Rung("steps", (32, 48), halved=True), list[Any]()
    monkeypatch.setattr(engine.capacity, "rung", lambda name: low)
    monkeypatch.setattr(engine.capacity, "observe", lambda sizes, *_: seen.append(sizes))
    works = [work(0, 0, 9), work(1, 9, 12, last=True)]
    async with aclosing(engine.edit(replaced(mode="live"), Source(*works).take)) as given:
        edited = [event async for event in given if isinstance(event, Edited)]
    assert [chunk.rung for chunk in edited] == ["steps"] * 2
    assert seen == [replace(SIZES, halved=True)] * 2


@pytest.mark.parametrize("warmed", [True, False])
async def test_a_streams_first_chunks_say_nothing_of_a_size_that_was_warmed_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, warmed: bool
) -> None:
    """They see a shorter window, and make ready what later ones use, as those of a warm-up that do
    not count either."""
    seen, count = list[float](), filling(engine) + 2
    engine.capacity.warm = {SIZES: 0.1} if warmed else {}
    monkeypatch.setattr(engine.capacity, "observe", lambda sizes, cost, _: seen.append(cost))
    took = [float(n) for n in range(count)]
    run, costs = engine.scheduler.run, iter([0.0, *took])  # the first opens it

    async def timed(*args: Any, **named: Any) -> Any:
        return replace(await run(*args, **named), run_s=1000 + next(costs))

    monkeypatch.setattr(engine.scheduler, "run", timed)
    await events(engine, OPENING, *chunks(count))
    counted = took[-2:] if warmed else took
    assert seen == [1000 + cost for cost in counted]


async def test_what_is_known_of_an_editor_is_of_one_moment(engine: Engine) -> None:
    """A report is sent while chunks are measured."""
    engine.capacity.observe(SIZES, 0.5)
    engine.capacity.models["m"] = Warm(12)
    known = engine.capacity.known("e")
    del engine.capacity.models["m"]
    engine.capacity.observe(SIZES, 1.5)
    engine.capacity.observe(replace(SIZES, halved=True), 1.0)
    assert (known.costs, known.models) == ({SIZES: 0.5}, {"m": Warm(12)})
    assert np.isclose(engine.capacity.costs[SIZES], 0.6)
