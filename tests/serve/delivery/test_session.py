"""What a session gives out, takes back and delivers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from serve.delivery.session import IllegalTransitionError, Session, State
from serve.hub.records import Progress
from serve.wire.codec import MAX_INDEX
from serve.wire.protocol import WireError
from serve.wire.work import Opening, Ready
from tests.serve.delivery.sessions import (
    PIXELS,
    READY,
    answer,
    edited,
    feed,
    indices,
    make,
    messages,
)

# A fault here is mostly work that never comes.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


@pytest.mark.parametrize(
    ("opened", "there", "unsent", "sign"),
    [
        (True, 3, 0, lambda session: feed(session, 1)),
        (True, 3, 0, lambda session: session.finish()),
        (True, 9, 24, lambda session: session.sent(1)),
        (True, 9, 30, lambda session: session.sent(7)),
        (False, 9, 0, lambda session: session.opened(READY)),
    ],
)
async def test_who_waits_for_work_hears_when_there_is_some(
    opened: bool, there: int, unsent: int, sign: Callable[[Session], object]
) -> None:
    session = make(opened=opened)
    session.unsent = unsent
    feed(session, there)
    taking = asyncio.ensure_future(session.take())
    await asyncio.sleep(0)
    assert not taking.done()
    sign(session)
    await asyncio.sleep(0)
    assert taking.done()


async def test_chunks_are_9_frames_then_12() -> None:
    session = make()
    feed(session, 21)
    first, second = await session.take(), await session.take()
    assert (len(first.frames), len(second.frames)) == (9, 12)
    entries = answer(session, first)
    assert indices(entries) == list(range(9))
    assert [e.position for e in entries] == [0, *range(9), 9]
    assert messages(entries)[1] == {
        "type": "chunk", "index": 0, "first_frame": 0, "frames": 9, "compute_ms": 40.0,
        "recomputed": 0.5, "steps": 4, "latency_ms": messages(entries)[1]["latency_ms"],
    }  # fmt: skip
    assert messages(entries)[0] == {
        "type": "mask", "index": 0, "latents": 3, "rows": 2, "columns": 3, "data": "QAAA",
    }  # fmt: skip
    assert indices(answer(session, second)) == list(range(9, 21))


async def test_a_frame_without_its_image_is_no_frame_that_is_left_out() -> None:
    session = make()
    feed(session, 9)
    delivery = session.deliver(edited(await session.take()))
    for images in (8, 10):
        with pytest.raises(ValueError, match="zip"):
            session.entries(delivery, [b"image"] * images)


async def test_four_frames_go_ahead_of_their_chunk() -> None:
    """A latent's worth each; what completes the chunk comes as one, and has the chunk's prompt."""
    session = make()
    feed(session, 3)
    taking = asyncio.ensure_future(session.take())
    await asyncio.sleep(0)
    assert not taking.done()
    feed(session, 2)
    first = await taking
    session.set_prompt("blue")
    feed(session, 4)
    rest = await session.take()
    assert [(w.number, len(w.frames), w.more) for w in (first, rest)] == [
        (0, 4, True),
        (0, 5, False),
    ]
    assert rest.prompt == "blue"
    whole = replace(rest, frames=np.concatenate([first.frames, rest.frames]))
    assert indices(answer(session, whole)) == list(range(9))
    assert session.settled == 9


async def test_what_went_ahead_is_given_out_again_unless_the_state_holds_it() -> None:
    session = make()
    feed(session, 8)
    ahead = [await session.take(), await session.take()]
    session.lost()
    session.opened(replace(READY, chunks=0))
    assert [await session.take() for _ in ahead] == ahead  # the editor died
    session.lost(4)
    session.opened(replace(READY, chunks=0))
    assert await session.take() is ahead[1]  # it left after the first
    feed(session, 1)
    assert not (await session.take()).more


async def test_a_close_after_frames_that_went_ahead() -> None:
    session = make()
    feed(session, 4)
    assert (await session.take()).more
    assert session.idle  # nothing is edited until the client goes on
    session.finish()
    last = await session.take()
    assert (last.number, len(last.frames), last.last, last.more) == (0, 0, True, False)


@pytest.mark.parametrize(("count", "sizes"), [(0, [0]), (5, [5]), (9, [9]), (12, [9, 3])])
async def test_close_gives_out_what_is_there(count: int, sizes: list[int]) -> None:
    session = make()
    feed(session, count)
    session.finish()
    assert session.state is State.FINISHING
    works = [await session.take() for _ in sizes]
    assert [len(work.frames) for work in works] == sizes
    assert [work.last for work in works] == [False] * (len(sizes) - 1) + [True]


async def test_close_after_the_last_full_chunk_was_taken() -> None:
    session = make()
    feed(session, 9)
    assert not (await session.take()).last
    session.finish()
    last = await session.take()
    assert (len(last.frames), last.last) == (0, True)


async def test_lossless_reads_no_further_when_behind() -> None:
    session = make()
    feed(session, 24)
    room = asyncio.ensure_future(session.room())
    await asyncio.sleep(0)
    assert not room.done()
    await session.take()
    await asyncio.sleep(0)
    assert room.done()


async def test_a_slow_client_gets_no_more_work_done() -> None:
    session = make("live")
    feed(session, 9)
    answer(session, await session.take())
    feed(session, 12)
    answer(session, await session.take())
    feed(session, 12)
    answer(session, await session.take())
    feed(session, 12)
    taking = asyncio.ensure_future(session.take())
    await asyncio.sleep(0)
    assert not taking.done()
    session.sent(12)
    assert len((await taking).frames) == 12


async def test_prompts_apply_from_the_next_chunk_and_are_announced() -> None:
    session = make()
    feed(session, 9)
    first = await session.take()
    session.set_prompt("blue")
    feed(session, 12)
    second = await session.take()
    assert (first.prompt, second.prompt) == ("red", "blue")
    assert [m["type"] for m in messages(answer(session, first))] == ["mask", "chunk"]
    said = session.entries(
        session.deliver(replace(edited(second), unknown="blue")), [b"image"] * len(second.frames)
    )
    assert messages(said)[1] == {
        "type": "prompt_applied", "prompt": "blue", "first_frame": 9, "unknown": "blue",
    }  # fmt: skip


async def test_started_work_is_given_out_again_when_the_editor_is_lost() -> None:
    session = make()
    feed(session, 21)
    first, second = await session.take(), await session.take()
    answer(session, first)
    session.lost()
    assert session.state is State.RECOVERING
    session.set_prompt("blue")
    session.opened(Ready("m", 12, 9, chunks=1))
    again = await session.take()
    assert again is second
    assert again.prompt == "red"
    assert indices(answer(session, again)) == list(range(9, 21))
    feed(session, 12)
    assert len((await session.take()).frames) == 12


async def test_two_losses_give_no_work_out_twice() -> None:
    """Whatever the editor between them has asked for: nothing, a part, or all of it."""
    session = make()
    feed(session, 21)
    works = [await session.take(), await session.take()]
    for asked in (0, 1, 2):
        session.lost()
        session.opened(READY)
        assert [await session.take() for _ in range(asked)] == works[:asked]
    answer(session, works[0])
    session.lost()
    session.opened(replace(READY, chunks=1))
    assert await session.take() is works[1]
    answer(session, works[1])
    feed(session, 12)
    assert (await session.take()).number == 2


async def test_only_what_was_delivered_is_settled() -> None:
    """Not what an editor has: from there on another front would begin."""
    session = make()
    feed(session, 24)
    assert session.settled == 0
    works = [await session.take(), await session.take()]
    assert session.settled == 0
    assert [session.deliver(edited(work)).settled for work in works] == [9, 21]
    assert session.settled == 21  # three more wait
    session.finish()
    assert session.deliver(edited(await session.take())).settled == session.settled == 24


async def test_losing_the_editor_while_finishing() -> None:
    session = make()
    feed(session, 12)
    session.finish()
    answer(session, await session.take())
    last = await session.take()
    session.lost()
    session.opened(Ready("m", 12, 9, chunks=1))
    assert session.state is State.FINISHING
    assert await session.take() is last


async def test_a_resumed_session_starts_where_it_stood() -> None:
    session = make(opened=False)
    session.next_frame, session.edited = 45, 40
    session.opened(Ready("m", 12, 9, chunks=4))
    assert session.settled == 45
    feed(session, 12)
    entries = answer(session, await session.take())
    assert indices(entries) == list(range(45, 57))
    assert entries[0].position == 40


def test_frames_must_come_in_order() -> None:
    session = make()
    feed(session, 3)
    for wrong in (2, 4):
        with pytest.raises(WireError, match="frame 3 must come next") as raised:
            session.feed(wrong, 0, PIXELS)
        assert raised.value.code == "bad_frame"


def test_nothing_may_come_after_close() -> None:
    session = make()
    session.finish()
    for late in (
        lambda: session.feed(0, 0, PIXELS),
        lambda: session.set_prompt("x"),
        session.finish,
    ):
        with pytest.raises(WireError) as raised:
            late()
        assert raised.value.code == "bad_request"


@pytest.mark.parametrize(
    ("path", "illegal"),
    [
        ([], State.RECOVERING),
        ([], State.FINISHING),
        ([State.STREAMING], State.NEW),
        ([State.STREAMING, State.FINISHING], State.STREAMING),
        ([State.CLOSED], State.STREAMING),
    ],
)
def test_illegal_transitions_are_defects(path: list[State], illegal: State) -> None:
    session = make(opened=False)
    for state in path:
        session.to(state)
    with pytest.raises(IllegalTransitionError, match=illegal.value):
        session.to(illegal)


def test_frame_indices_end_before_the_header_does() -> None:
    session = make(opened=False)
    session.next_frame = MAX_INDEX - 1
    session.feed(MAX_INDEX - 1, 0, PIXELS)
    with pytest.raises(WireError, match="used up") as raised:
        session.feed(MAX_INDEX, 0, PIXELS)
    assert raised.value.code == "bad_request"


@pytest.mark.parametrize("unsent", [23, 24])
async def test_another_chunk_is_begun_while_fewer_than_two_wait_for_the_client(
    unsent: int,
) -> None:
    session = make()
    session.unsent = unsent
    feed(session, 9)
    taking = asyncio.ensure_future(session.take())
    await asyncio.sleep(0)
    assert taking.done() is (unsent == 23)
    taking.cancel()


async def test_a_session_is_idle_when_only_its_client_can_make_it_go_on() -> None:
    session = make()
    assert session.idle
    feed(session, 9)
    work = await session.take()
    assert not session.idle  # it is being edited
    answer(session, work)
    assert not session.idle  # the client has to take it
    session.sent(8)
    assert not session.idle
    session.sent()  # one, as each is when it leaves
    assert session.idle
    session.finish()
    assert not session.idle


async def test_the_latency_counts_from_the_last_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    session = make()
    for _ in range(9):
        now += 1.0
        feed(session, 1)
    now += 0.25
    work = await session.take()
    made = replace(edited(work), compute_ms=40.12345, recomputed=0.123456)
    now += 0.00123
    chunk = messages(session.entries(session.deliver(made), [b"image"] * 9))[-1]
    assert (chunk["latency_ms"], chunk["compute_ms"]) == (251.23, 40.12)
    assert chunk["recomputed"] == 0.1235


async def test_a_change_of_quality_is_told_before_its_first_frame() -> None:
    session = make()
    told = []
    for rung, size in [("full", "x"), ("mask", "x"), ("size", "y"), ("size", "y"), ("full", "x")]:
        feed(session, 12 if told else 9)
        work = await session.take()
        delivery = session.deliver(replace(edited(work), rung=rung, work_size=size))
        entries = session.entries(delivery, [b"image"] * len(work.frames))
        session.sent(len(work.frames))
        kinds = [message["type"] for message in messages(entries)]
        assert kinds in (["mask", "chunk"], ["mask", "quality", "chunk"])
        assert isinstance(entries[len(kinds) - 1].data, bytes)  # all but "chunk" is before them
        assert session.quality == ("full" if rung == "full" else f"{rung} {size}")
        told += [m for m in messages(entries) if m["type"] == "quality"] or [None]
    fields = {"type": "quality", "steps": 4}
    assert told == [
        None,
        fields | {"level": "mask", "first_frame": 9, "work_size": "x"},
        fields | {"level": "size", "first_frame": 21, "work_size": "y"},
        None,
        fields | {"level": "full", "first_frame": 45, "work_size": "x"},
    ]


async def test_a_chunk_is_by_the_model_of_the_editor_that_made_it() -> None:
    """A session that was moved to another version says so from there on."""
    session = make()
    feed(session, 21)
    first = session.deliver(edited(await session.take()))
    await session.take()
    session.lost()
    session.opened(replace(READY, model="m version 2", chunks=1))
    second = session.deliver(edited(await session.take()))
    assert (first.model, second.model) == ("m", "m version 2")


def test_a_resumed_session_knows_what_its_client_was_told() -> None:
    progress = Progress(45, 40, "blue", "green", None, False, ((9, 2), (20, 1)), "size y")
    session = Session(Opening("s", "red", 48, 32, 16.0, "live"), progress)
    assert (session.quality, session.drops.told) == ("size y", [(9, 2), (20, 1)])
    assert (session.next_frame, session.edited) == (45, 40)
    assert (session.prompt, session.applied_prompt) == ("blue", "green")
