"""Both sides of a stream's link: what is said when, and when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from serve.wire import conversation
from serve.wire.conversation import KINDS, Conversation, answer
from serve.wire.link import Link, Listener
from serve.wire.protocol import Error, WireError
from serve.wire.split_state import SplitState
from serve.wire.work import (
    Asks,
    Edited,
    EditorEvent,
    EditorLostError,
    Frames,
    Moved,
    Opening,
    Ready,
    Superseded,
    SupersededError,
    Take,
    Work,
)

pytestmark = pytest.mark.anyio

OPENING = Opening("s", "p", 6, 4, 16.0, "live")
READY = Ready("m", 12, 9, 0)


def work(number: int, *, last: bool = False) -> Work:
    return Work(number, "p", np.full((2, 4, 6, 3), number, np.uint8), last)


def edited(number: int) -> Edited:
    return Edited(number, number, 1.0, 4, 1.0, 0.0, 0.0, None, SplitState(b"s"))


async def to_the_end(link: Link) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            await link.read()


@asynccontextmanager
async def talking(*works: Work) -> AsyncIterator[tuple[Conversation, Link, asyncio.Future[None]]]:
    """A front's side, the editor's link, and the call that is its pin."""
    given, listener = iter(works), Listener("127.0.0.1", KINDS)

    async def take() -> Work:
        return next(given)

    pin: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(20), Conversation(listener, take) as front:
        front.pin(pin)
        link = await Link.connect(front.address, KINDS)
        yield front, link, pin
    assert listener._expected == {}  # nobody is let in to a stream that is over
    await asyncio.sleep(0)
    assert pin.done()  # and its editor has the place again
    await asyncio.wait_for(to_the_end(link), 20)  # and nobody holds a descriptor for it
    link.close()
    listener.close()


async def test_an_editor_is_given_work_when_it_asks_and_is_over_with_the_last() -> None:
    async with talking(work(0), work(1, last=True)) as (front, link, _):
        await link.write(READY)
        assert await front.next() == READY
        for number in range(2):
            await link.write(Asks())
            coming = asyncio.create_task(front.next())
            assert (await link.read()).number == number
            await link.write(edited(number))
            assert (await coming).number == number
        assert await front.next() is None  # while link and call are still there


class Editing:
    """`work.Backend` that gives back what it is given."""

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        yield READY
        for _ in range(3):
            work = await take()
            yield Frames(work.frames)
            yield edited(work.number)


async def test_both_ends_of_a_stream_hear_each_other_to_its_last_chunk() -> None:
    async with talking(work(0), work(1), work(2, last=True)) as (front, link, _):
        answering = asyncio.create_task(answer(Editing(), OPENING, link))
        assert await front.next() == READY
        for number in range(3):
            frames = await front.next()
            assert isinstance(frames, Frames)
            assert np.array_equal(frames.frames, work(number).frames)
            assert await front.next() == edited(number)
        assert await front.next() is None
        await answering


async def test_an_editor_that_gave_its_stream_back_is_not_heard_further() -> None:
    async with talking() as (front, link, _):
        await link.write(Moved(SplitState(b"state"), 4))
        assert await front.next() == Moved(SplitState(b"state"), 4)
        assert await front.next() is None


@pytest.mark.parametrize("died", [False, True])
async def test_what_an_editor_said_last_is_heard_after_its_call_has_ended(
    died: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the call comes through Ray, and may be there first."""
    monkeypatch.setattr(conversation, "LAST_WORDS_S", 60.0)
    async with talking() as (front, link, pin):
        await link.write(READY)
        assert await front.next() == READY
        pin.set_exception(EditorLostError("dead")) if died else pin.set_result(None)
        coming = asyncio.create_task(front.next())
        for _ in range(20):
            await asyncio.sleep(0)
        await link.write(Moved(SplitState(b"state"), 4))
        assert await coming == Moved(SplitState(b"state"), 4)


async def test_how_a_call_ends_whose_stream_is_over_is_nobodys_matter() -> None:
    """Else the front's log would say that an exception was never retrieved."""
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with talking() as (front, link, pin):
        await link.write(Moved(SplitState(b""), 0))
        await front.next()
        pin.set_exception(EditorLostError("dead"))
        await asyncio.sleep(0)
    del front, link, pin
    gc.collect()
    assert told == []


@pytest.mark.parametrize("lost", [False, True])
async def test_whose_call_ended_before_its_link_was_there_is_waited_for_unless_it_died(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "LAST_WORDS_S", 60.0)
    listener = Listener("127.0.0.1", KINDS)
    pin: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(20), Conversation(listener, asyncio.Event().wait) as front:  # type: ignore[arg-type]
        front.pin(pin)
        pin.set_exception(EditorLostError("dead")) if lost else pin.set_result(None)
        coming = asyncio.create_task(front.next())
        for _ in range(20):
            await asyncio.sleep(0)
        assert coming.done() is lost
        if not lost:
            link = await Link.connect(front.address, KINDS)
            await link.write(Superseded())
        with pytest.raises(EditorLostError if lost else SupersededError):
            await coming
    listener.close()


async def test_one_editor_has_a_stream() -> None:
    """A second that comes with its address is sent away at once, and changes nothing."""
    async with talking() as (front, link, _):
        await link.write(READY)
        assert await front.next() == READY
        second = await Link.connect(front.address, KINDS)
        with pytest.raises(ConnectionError, match="closed the connection"):
            await second.read()
        await link.write(Moved(SplitState(b""), 0))
        assert await front.next() == Moved(SplitState(b""), 0)


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        (Superseded(), SupersededError),
        (Error("at_capacity", "no room", 5.0), WireError),
        (None, EditorLostError),  # the link is closed
    ],
)
async def test_what_ends_a_stream_is_raised(
    said: Any, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "LAST_WORDS_S", 0.01)
    async with talking() as (front, link, _):
        await (link.write(said) if said else asyncio.sleep(0))
        link.close()
        with pytest.raises(raised) as ended:
            await front.next()
        if isinstance(ended.value, WireError):
            assert ended.value.told == said


async def test_why_a_call_failed_is_told_rather_than_that_its_link_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which may be noticed first."""
    monkeypatch.setattr(conversation, "LAST_WORDS_S", 60.0)
    async with talking() as (front, link, pin):
        await link.write(READY)
        assert await front.next() == READY
        link.close()
        coming = asyncio.create_task(front.next())
        while not front._hearing.done():
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        pin.set_exception(WireError("internal", "the editor failed"))
        with pytest.raises(WireError, match="the editor failed"):
            await coming


class Endless:
    """`work.Backend` that edits until it is told to end."""

    ended = False

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        try:
            while True:
                yield Frames(np.zeros((1, 4, 6, 3), np.uint8))
                await asyncio.sleep(0)
        finally:
            self.ended = True


async def test_an_editor_that_was_let_go_of_has_ended_its_stream_with_its_call() -> None:
    """Not when the garbage is collected: who comes next wants the place."""
    editing = Endless()
    async with talking() as (front, link, _):
        answering = asyncio.create_task(answer(editing, OPENING, link))
        assert isinstance(await front.next(), Frames)
    with pytest.raises(OSError):  # noqa: PT011 - of whatever kind
        await answering
    assert editing.ended


class Ending:
    """`work.Backend` that says what it says and then raises `error`."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        yield READY
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SupersededError(), Superseded()),
        (WireError("too_slow", "no", 2.0), Error("too_slow", "no", 2.0)),
        (None, None),
    ],
)
async def test_an_editor_says_what_it_ends_of(error: Exception | None, told: Any) -> None:
    """And its call ends as any other: what is raised through Ray is a defect."""
    here, listener = asyncio.Queue[Link](), Listener("127.0.0.1", KINDS)
    async with asyncio.timeout(20):
        there = await Link.connect(await listener.expect(here.put), KINDS)
        front = await here.get()
        await answer(Ending(error), OPENING, there)
        assert await front.read() == READY
        if told:
            assert await front.read() == told
    for end in (there, front, listener):
        end.close()
