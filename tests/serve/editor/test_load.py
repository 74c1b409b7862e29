"""An editor under load: what is long, what is stuck, who pays for what, whose stream it is."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.editor import StreamingEditor
from serve.admission.admission import Sizes
from serve.editor import stream as editor_stream
from serve.editor.engine import Engine
from serve.editor.stream import EditorStream
from serve.limits import Limits
from serve.wire.protocol import Open, WireError
from serve.wire.work import Edited, EditorEvent, Opening, Ready, SupersededError, Work
from tests.serve.conftest import clip
from tests.serve.editor.works import following, standalone

pytestmark = pytest.mark.anyio

SIZES = Sizes((32, 48), (32, 48), "off")
OPENING = Opening("one", "red", 48, 32, 16.0, "live")


@pytest.fixture(scope="module")
def editor(small_model: Path) -> StreamingEditor:
    torch.set_num_threads(1)
    return StreamingEditor.load(str(small_model))


@pytest.fixture
def engine(editor: StreamingEditor) -> Iterator[Engine]:
    running = standalone(editor, measured=False)
    running.capacity.costs[SIZES] = 0.1
    yield running
    running.on.scheduler.stop()


class Source:
    """The front's side of a stream: chunks as often as they are asked for, then nothing."""

    def __init__(self, chunks: int) -> None:
        self.left, self.number = chunks, 0

    async def take(self) -> Work:
        if self.left == 0:
            await asyncio.Event().wait()
        self.left -= 1
        number, self.number = self.number, self.number + 1
        return Work(number, "red", clip(9 if number == 0 else 12), last=False)


async def opened(engine: Engine, opening: Opening, chunks: int = 0) -> AsyncGenerator[EditorEvent]:
    events = engine.edit(opening, Source(chunks).take)
    assert isinstance(await anext(events), Ready)
    return events


class Gate:
    """The editor's VAE stands still in the middle of a chunk until `open` is set."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        decode = engine.editor.vae.decode

        def wait(*args: Any, **options: Any) -> Any:
            assert self.open.wait(30)
            return decode(*args, **options)

        monkeypatch.setattr(engine.editor.vae, "decode", wait)


@pytest.fixture
def gate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(engine, monkeypatch)
    yield made
    made.open.set()


async def in_a_chunk(engine: Engine) -> None:
    while not any(stream.running for stream in engine._streams.values()):
        await asyncio.sleep(0.005)


async def test_a_stuck_chunk_ends_its_session_and_no_other(
    engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor_stream, "STUCK_S", 0.2)
    monkeypatch.setattr(editor_stream, "STUCK_TIMES", 1.0)
    other = await opened(engine, replace(OPENING, session="two"))
    waiting = asyncio.ensure_future(anext(other))
    stuck = await opened(engine, OPENING, chunks=1)
    editing = asyncio.ensure_future(anext(stuck))
    await in_a_chunk(engine)
    engine.on.check()
    await asyncio.sleep(0.3)
    with pytest.raises(RuntimeError, match=r"running for more than 0\.2 s"):
        engine.on.check()
    with pytest.raises(WireError) as raised:
        await asyncio.wait_for(editing, 20)
    assert raised.value.code == "internal"
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_a_long_chunk_is_not_a_stuck_one(
    engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs 0.1 s here, so it may take ten times as long."""
    monkeypatch.setattr(editor_stream, "STUCK_S", 0.2)
    stream = await opened(engine, OPENING, chunks=1)
    editing = asyncio.ensure_future(following(stream))
    await in_a_chunk(engine)
    await asyncio.sleep(0.4)
    engine.on.check()
    gate.open.set()
    assert isinstance(await editing, Edited)


async def test_a_chunk_whose_client_has_gone_counts_until_it_is_done(
    engine: Engine, gate: Gate
) -> None:
    stream = await opened(engine, OPENING, chunks=1)
    editing = asyncio.ensure_future(anext(stream))
    await in_a_chunk(engine)
    editing.cancel()
    await asyncio.gather(editing, return_exceptions=True)
    await stream.aclose()
    await asyncio.sleep(0.1)
    assert engine.capacity.load == pytest.approx(0.1 * 16 / 12)
    gate.open.set()
    while engine.capacity.loads:
        await asyncio.sleep(0.01)


async def test_a_size_that_cannot_be_done_in_time_is_refused(engine: Engine) -> None:
    engine.capacity.costs = {SIZES: 0.1}
    with pytest.raises(WireError, match="1280x720, edited at full, would take about 60 s") as no:
        await opened(engine, replace(OPENING, width=1280, height=720))
    assert no.value.code == "unsupported_size"
    assert not engine.capacity.loads


async def test_a_sessions_share_follows_what_its_chunks_cost(engine: Engine) -> None:
    """Also for admission: it was 0.13 and is 0.6, so no second one of 0.6 fits."""
    engine.capacity.measured = True
    stream = await opened(engine, OPENING)
    assert engine.capacity.load == pytest.approx(0.1 * 16 / 12)
    (name,) = engine.capacity.loads
    for _ in range(60):
        engine.capacity.observe(SIZES, 0.45, name)
    assert engine.capacity.load == pytest.approx(0.6, abs=0.01)
    with pytest.raises(WireError, match="60%") as raised:
        await opened(engine, replace(OPENING, session="two"))
    assert raised.value.code == "at_capacity"
    await stream.aclose()


async def test_a_newer_stream_of_a_session_ends_the_older_one(engine: Engine) -> None:
    """At a full editor, too: it was refused by its own ghost until that was missed."""
    engine.capacity.max_sessions = 1
    ghost = await opened(engine, OPENING)
    waiting = asyncio.ensure_future(anext(ghost))
    await asyncio.sleep(0)
    back = await opened(engine, replace(OPENING, epoch=1), chunks=1)
    with pytest.raises(SupersededError):
        await waiting
    assert len(engine.capacity.loads) == 1  # the old stream's end took nothing of the new one's
    with pytest.raises(SupersededError):
        await asyncio.wait_for(opened(engine, OPENING), 20)
    assert isinstance(await following(back), Edited)
    # The same holder's next try ends its last one, too.
    waiting = asyncio.ensure_future(anext(back))
    await asyncio.sleep(0)
    again = await opened(engine, replace(OPENING, epoch=1))
    with pytest.raises(SupersededError):
        await waiting
    assert len(engine.capacity.loads) == 1
    await again.aclose()
    assert not engine.capacity.loads


async def test_who_is_refused_ends_no_older_stream(engine: Engine) -> None:
    """One that comes back where its chunks have become too dear meanwhile."""
    waiting = asyncio.ensure_future(anext(await opened(engine, OPENING)))
    await asyncio.sleep(0)
    engine.capacity.costs = {SIZES: 31.0}
    with pytest.raises(WireError, match="would take about 31 s"):
        await opened(engine, replace(OPENING, epoch=1))
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("epochs", [(1, 2), (2, 1), (1, 1)])
async def test_of_two_that_come_back_at_once_one_has_the_stream(
    engine: Engine, epochs: tuple[int, int], late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest holder, or of two tries of the same the later; both found the same older one, and
    one looks again when the other has its place."""
    sleep = asyncio.sleep

    async def nap(seconds: float) -> None:
        await sleep(0.02 if asyncio.current_task() is asked[1 + late] else seconds)

    ghost, loads = await opened(engine, OPENING), engine.capacity.loads
    asked = [asyncio.ensure_future(anext(ghost))]
    await asyncio.sleep(0)
    streams = [engine.edit(replace(OPENING, epoch=e), Source(0).take) for e in epochs]

    async def whole(events: AsyncGenerator[EditorEvent]) -> None:
        assert isinstance(await anext(events), Ready)
        await anext(events)

    asked += [asyncio.create_task(whole(events)) for events in streams]
    monkeypatch.setattr(asyncio, "sleep", nap)
    async with asyncio.timeout(20):
        while sum(task.done() for task in asked) < 2 or not len(engine._streams) == len(loads) == 1:
            await asyncio.sleep(0.005)
    (left,) = (task for task in asked if not task.done())
    over = [task.exception() for task in asked if task.done()]
    assert [type(error) for error in over] == [SupersededError] * 2
    assert left is asked[1 + max(range(2), key=lambda n: (epochs[n], n))]
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    async with asyncio.timeout(20):
        await engine.scheduler.run(int, due=math.inf)  # after all that they had asked for
        await asyncio.gather(*engine._releases)  # a chunk has its place until it is over
    assert (loads, engine._streams) == ({}, {})


# --- whose turn it is


async def test_who_sends_more_than_it_said_gets_what_others_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(editor_stream.time, "monotonic", lambda: now)
    slow = replace(OPENING, fps=1.0)
    false = [EditorStream("s", replace(slow, mode=mode), 12) for mode in ("live", "lossless")]
    honest = EditorStream("s", OPENING, 12)
    for stream in false:
        stream.due(12, 1.0)
    assert honest.due(12, 1.0) == pytest.approx(1000.75)
    now = 1000.75  # both send a chunk again at once, as if they had said 16 frames a second
    assert honest.due(12, 1.0) == pytest.approx(1001.5)
    for stream in false:
        assert stream.due(12, 1.0) > 1010.0
    # Not for ever, however much it has sent: once it keeps its rate it is soon where it was.
    for _ in range(20):
        false[0].due(12, 1.0)
    now = 1022.0
    assert false[0].due(12, 1.0) == pytest.approx(1034.0)


async def test_a_source_that_is_a_little_fast_is_not_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(editor_stream.time, "monotonic", lambda: now)
    stream = EditorStream("s", OPENING, 12)
    for _ in range(1000):
        due = stream.due(12, 1.0)
        assert due == pytest.approx(now + 0.75)
        now += 0.75 / 1.05


def test_a_rate_has_a_floor() -> None:
    limits = Limits()
    message = Open("red", 48, 32, 0.001, "lossless", "jpeg")
    with pytest.raises(WireError, match=r"fps must lie in \[1, 60\], got 0\.001"):
        limits.check_open(message)
    limits.check_open(replace(message, fps=1.0))
