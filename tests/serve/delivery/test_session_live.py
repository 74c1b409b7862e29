"""What a live session drops, and what it does not."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from serve.wire.protocol import Mode
from tests.serve.delivery.sessions import answer, feed, indices, make, messages

# A fault here is mostly work that never comes.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


async def test_live_drops_no_frame_that_went_ahead() -> None:
    session = make("live")
    feed(session, 4)
    begun = await session.take()
    feed(session, 20)
    rest = await session.take()
    assert (len(begun.frames), len(rest.frames)) == (4, 5)
    whole = replace(rest, frames=np.concatenate([begun.frames, rest.frames]))
    assert indices(answer(session, whole)) == [0, 1, 2, 3, *range(19, 24)]
    assert session.drops.count == 15


async def test_live_drops_the_oldest_frames_not_started() -> None:
    session = make("live")
    feed(session, 9)
    started = await session.take()
    told = feed(session, 18)
    assert told == []
    assert session.drops.count == 0
    assert feed(session, 11) == []  # a chunk of them is worth a message of its own
    told = feed(session, 1)
    assert messages(told) == [{"type": "dropped", "first_frame": 9, "frames": 12}]
    feed(session, 3)
    entries = answer(session, started)
    assert indices(entries) == list(range(9))
    assert messages(entries)[0] == {"type": "dropped", "first_frame": 21, "frames": 3}
    entries = answer(session, await session.take())
    assert messages(entries)[0] == {"type": "dropped", "first_frame": 24, "frames": 6}
    assert indices(entries) == list(range(30, 42))
    assert session.settled == 42
    assert (session.edited, session.drops.count) == (21, 21)


async def test_drops_that_are_apart_are_told_apart() -> None:
    session = make("live")
    feed(session, 9)
    first = await session.take()
    feed(session, 20)  # two are too many, and six more wait where a chunk is begun
    second = await session.take()
    feed(session, 20)  # again two too many
    entries = answer(session, first)
    assert [m for m in messages(entries) if m["type"] == "dropped"] == [
        {"type": "dropped", "first_frame": 9, "frames": 8},
        {"type": "dropped", "first_frame": 29, "frames": 2},
    ]
    assert indices(answer(session, second)) == list(range(17, 29))
    assert session.drops.count == 10
    assert session.drops.told_from(16) == [(9, 8), (29, 2)]  # what another front has to know


async def test_what_was_told_of_as_dropped_stays_dropped() -> None:
    """To a client that comes back and sends from the frame on that it is asked for."""
    session = make("live")
    session.next_frame, session.drops.told = 4, [(2, 3), (7, 2), (20, 1)]
    feed(session, 14)
    assert session.next_frame == 18
    work = await session.take()
    assert indices(answer(session, work)) == [5, 6, 9, 10, 11, 12, 13, 14, 15]
    assert session.drops.count == 0  # they are counted already
    assert session.drops.told_from(8) == [(7, 2), (20, 1)]
    assert session.drops.told_from(9) == [(20, 1)]


async def test_live_drops_nothing_for_a_little_jitter() -> None:
    session = make("live")
    feed(session, 9)
    answer(session, await session.take())
    for _ in range(5):
        feed(session, 12)
        work = await session.take()
        feed(session, 5)
        session.sent(12)
        answer(session, work)
        feed(session, 7)
        answer(session, await session.take())
        session.sent(12)
    assert session.drops.count == 0


async def test_live_edits_all_that_is_there_at_the_end() -> None:
    session = make("live")
    feed(session, 9)
    first = await session.take()
    feed(session, 18)
    session.finish()
    answer(session, first)
    assert indices(answer(session, await session.take())) == list(range(9, 21))
    assert indices(answer(session, await session.take())) == list(range(21, 27))


@pytest.mark.parametrize(("mode", "most"), [("lossless", 24), ("live", 18)])
async def test_what_may_wait_is_counted_to_the_frame(mode: Mode, most: int) -> None:
    session = make(mode)
    feed(session, 9)
    await session.take()
    assert feed(session, most - 1) == []
    async with asyncio.timeout(1):
        await session.room()
    feed(session, 1)
    room = asyncio.ensure_future(session.room())
    await asyncio.sleep(0)
    assert room.done() is (mode == "live")
    assert session.drops.count == 0
    feed(session, 1)
    assert session.drops.count == (mode == "live")
    room.cancel()


async def test_a_closed_sessions_live_frames_are_all_edited() -> None:
    """Those that wait when it closes, however many: nobody is waiting for newer ones."""
    session = make("live")
    feed(session, 9)
    work = await session.take()
    feed(session, 18)
    session.finish()
    sizes = [len(work.frames)]
    while not work.last:
        answer(session, work)
        session.sent(len(work.frames))
        work = await session.take()
        sizes.append(len(work.frames))
    assert (sizes, session.drops.count) == ([9, 12, 6], 0)
