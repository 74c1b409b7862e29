"""A session across editors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from serve.delivery.driver import MAX_DEATHS, OPENING_S, RECOVERY_S, drive
from serve.delivery.session import Delivery, Session
from serve.metrics import Metrics
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.split_state import HistoryPart, SplitState
from serve.wire.work import (
    Edited,
    EditorEvent,
    EditorLostError,
    Frames,
    Moved,
    Opening,
    Queued,
    Ready,
    Take,
    Work,
)
from tests.serve.delivery.sessions import READY, edited, feed, make
from tests.serve.front.clock import Clock

STATE = SplitState(b"state")
PARTS = (HistoryPart.of(b"one"), HistoryPart.of(b"two"))


class Mortal:
    """A backend whose editors die over whatever chunk they are given."""

    def __init__(self) -> None:
        self.deaths = 0

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        yield Ready("m", 12, 9, 0)
        await take()
        self.deaths += 1
        raise EditorLostError("it is dead")


def fed_session() -> Session:
    """With the frames of a first chunk."""
    session = Session(Opening("s", "red", 48, 32, 16.0, "live"))
    for n in range(9):
        session.feed(n, 0, np.zeros((32, 48, 3), np.uint8))
    return session


@pytest.mark.anyio
async def test_a_chunk_that_kills_editors_is_not_tried_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.delivery.driver.FIRST_PAUSE_S", 0.001)
    backend, session = Mortal(), fed_session()
    events = drive(backend, session, Metrics())
    assert isinstance(await anext(events), Ready)
    with pytest.raises(WireError, match="2 editors were lost over one chunk") as raised:
        await anext(events)
    assert raised.value.code == "internal"
    assert backend.deaths == MAX_DEATHS == 2


class Starting(Mortal):
    """One whose first editors die before they are given anything."""

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        yield Ready("m", 12, 9, 0)
        if self.deaths < 2 * MAX_DEATHS:
            self.deaths += 1
            raise EditorLostError("it is dead")
        work = await take()
        yield Frames(work.frames)
        yield Edited(work.number, 0, 1.0, 4, 1.0, 0.0, 0.0, None, STATE)


@pytest.mark.anyio
async def test_who_had_no_work_did_not_die_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.delivery.driver.FIRST_PAUSE_S", 0.001)
    backend, session = Starting(), fed_session()
    events = drive(backend, session, Metrics())
    assert isinstance(await anext(events), Ready)
    frames, delivery = await anext(events), await anext(events)
    assert isinstance(frames, Frames)
    assert len(frames.frames) == 9
    assert isinstance(delivery, Delivery)
    assert backend.deaths == 2 * MAX_DEATHS


class Weary:
    """Its editors die once over each chunk."""

    def __init__(self) -> None:
        self.died: set[int] = set()

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        yield Ready("m", 12, 9, 0)
        while True:
            work = await take()
            if work.number not in self.died:
                self.died.add(work.number)
                raise EditorLostError("it is dead")
            yield Frames(work.frames)
            yield Edited(work.number, 0, 1.0, 4, 1.0, 0.0, 0.0, None, STATE)
            if work.last:
                return


@pytest.mark.anyio
async def test_a_chunk_is_not_blamed_for_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.delivery.driver.FIRST_PAUSE_S", 0.001)
    backend, session = Weary(), Session(Opening("s", "red", 48, 32, 16.0, "lossless"))
    for n in range(9 + 12 + 12):
        session.feed(n, 0, np.zeros((32, 48, 3), np.uint8))
    delivered = 0
    async for event in drive(backend, session, Metrics()):
        if isinstance(event, Ready):
            session.finish()
        elif isinstance(event, Delivery):
            session.sent(len(event.frames))
            delivered += len(event.frames)
    assert delivered == 33
    assert len(backend.died) > MAX_DEATHS


class Forgetful:
    """Its first editor leaves out what nobody has; the next goes on from what it is given."""

    def __init__(self) -> None:
        self.given: list[SplitState | None] = []
        self.over = 0  # streams that were closed

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        self.given.append(opening.state)
        yield Ready("m", 12, 9, 0)
        names = [part.name for part in PARTS]
        try:
            while True:
                work = await take()
                forgets = work.number == 1 and len(self.given) == 1
                new = () if forgets else PARTS[work.number : work.number + 1]
                state = SplitState(b"%d" % work.number, tuple(names[: work.number + 1]), new)
                yield Frames(work.frames)
                yield Edited(work.number, 0, 1.0, 4, 1.0, 0.0, 0.0, None, state)
        finally:
            self.over += 1


@pytest.mark.anyio
async def test_a_delivery_has_its_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.delivery.driver.FIRST_PAUSE_S", 0.001)
    backend, session = Forgetful(), Session(Opening("s", "red", 48, 32, 16.0, "lossless"))
    for n in range(9 + 12):
        session.feed(n, 0, np.zeros((32, 48, 3), np.uint8))
    events = drive(backend, session, Metrics())
    assert isinstance(await anext(events), Ready)
    for number in range(2):
        for _ in range(1 + number):  # those of the chunk that was edited again come again
            assert isinstance(await anext(events), Frames)
        delivery = await anext(events)
        assert isinstance(delivery, Delivery)
        assert delivery.edited.state is not None
        assert delivery.edited.state.parts == PARTS[: number + 1]
        session.sent(len(delivery.frames))
    one = SplitState(b"0", (PARTS[0].name,), PARTS[:1])
    assert backend.given == [None, one]  # what could not be whole was edited again
    await events.aclose()
    assert backend.over == 2  # at once, not when somebody collects what is left


# --- editors that do as they are told, under a clock of the test's own

FULL = WireError("at_capacity", "no room", 3.0)
LOST = EditorLostError("it is dead")


@dataclass
class Scripted:
    """The n-th call does what the n-th list says, the last again: it says or raises what is there,
    calls it, waits so many seconds, asks for work ("take") or answers it ("edit")."""

    scripts: list[list[Any]]
    at: list[float] = field(default_factory=list)  # of each call
    openings: list[Opening] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    over: float = 0.0  # when all was

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        self.at.append(asyncio.get_running_loop().time())
        assert len(self.at) < 1000, "it is asked again and again, without a pause"
        self.openings.append(opening)
        for step in self.scripts[min(len(self.at), len(self.scripts)) - 1]:
            if isinstance(step, Exception):
                raise step
            if step == "take":
                self.works.append(await take())
            elif step == "edit":
                for made in self._made():
                    yield made
            elif isinstance(step, float):
                await asyncio.sleep(step)
            elif callable(step):
                step()
            else:
                if isinstance(step, Queued):
                    await asyncio.sleep(0.5)
                yield step

    def _made(self) -> tuple[Frames, Edited]:
        """Of all that came of the newest chunk."""
        last = self.works[-1]
        frames = np.concatenate([w.frames for w in self.works if w.number == last.number])
        state = SplitState(b"state %d" % (last.number + 1), (PARTS[0].name,), PARTS[:1])
        return Frames(frames), replace(edited(last), state=state)


@pytest.fixture
def clock() -> Iterator[Clock]:
    with Clock() as made:
        yield made


def driven(
    clock: Clock, session: Session, *scripts: list[Any], seconds: float = 200.0
) -> tuple[list[Any], Scripted, Metrics]:
    """What comes of it, an error last, and when the calls were made, counted from the first."""
    backend, metrics, came = Scripted(list(scripts)), Metrics(), list[Any]()

    async def run() -> None:
        try:
            async for event in drive(backend, session, metrics):
                came.append(event)
        except WireError as error:
            came.append(error)
        backend.over = clock.now - backend.at[0]

    task = clock.task(run())
    clock.advance(seconds)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        clock.run(asyncio.wait_for(task, 1))  # type: ignore[arg-type]
    backend.at = [round(at - backend.at[0], 3) for at in backend.at]
    return came, backend, metrics


FALLING = [0.0, 0.1, 0.3, 0.7, 1.5, 3.1, 5.1, 7.1]  # pauses that double, up to two seconds


def test_a_new_session_that_no_editor_takes_is_refused_after_a_while(clock: Clock) -> None:
    (error,), backend, _ = driven(clock, make(opened=False), [LOST])
    assert (error.code, error.retry_after_s) == ("at_capacity", RETRY_AFTER_S)
    assert backend.at[: len(FALLING)] == FALLING
    assert OPENING_S - 2.0 <= backend.at[-1] <= OPENING_S + 2.0
    (error,), backend, _ = driven(clock, make(opened=False), [FULL])
    assert (error, backend.at) == (FULL, [0.0])  # at once
    # Nor is another asked by one that was open and would be refused there, too.
    wrong = WireError("bad_request", "edited by another model")
    events, backend, _ = driven(clock, make(opened=False), [READY, LOST], [wrong])
    assert (events, backend.at) == ([READY, wrong], [0.0, 0.1])
    # Nobody is looked for who has one, either: its editor has said why it goes no further.
    events, backend, _ = driven(clock, make(opened=False), [READY, FULL])
    assert (events, backend.at) == ([READY, FULL], [0.0])


def test_one_that_was_open_is_looked_for_longer(clock: Clock) -> None:
    for nothing in (LOST, FULL):
        events, backend, metrics = driven(
            clock, make(opened=False), [READY, LOST], [nothing], seconds=100.0
        )
        ready, error = events
        assert (ready, error.code) == (READY, "internal")
        assert f"no editor could take the session for {RECOVERY_S:g} s" in error.message
        assert backend.at[: len(FALLING)] == FALLING
        assert RECOVERY_S - 2.0 <= backend.at[-1] <= RECOVERY_S + 2.0
        assert [opening.again for opening in backend.openings[:3]] == [False, True, True]
        assert metrics.moved.labels("death")._value.get() == 1


def test_who_waits_hears_its_place_and_nobody_else_does(clock: Clock) -> None:
    place = Queued(3, 30.0)
    session = make(opened=False)
    session.opening = replace(session.opening, waits=True)
    events, backend, _ = driven(clock, session, [*[place] * 100, READY, "take"])
    assert events == [*[place] * 100, READY]  # for as long as it takes
    assert backend.at == [0.0]
    (error,), backend, _ = driven(clock, make(opened=False), [place] * 1000)
    assert (error.code, error.retry_after_s) == ("at_capacity", RETRY_AFTER_S)
    assert backend.over == pytest.approx(OPENING_S, abs=1.1)
    # One that was open waits as well, and longer: its client hears of chunks, not of places.
    for waits in (False, True):
        session = make(opened=False)
        session.opening = replace(session.opening, waits=waits)
        events, _, _ = driven(
            clock, session, [READY, LOST], [*[place] * 100, READY, "take"], seconds=55.0
        )
        assert events == [READY]
        again = driven(clock, make(opened=False), [READY, LOST], [place] * 1000)
        (ready, error), backend, _ = again
        assert (ready, error.code) == (READY, "internal")
        assert backend.over == pytest.approx(RECOVERY_S, abs=1.1)


def test_a_session_that_comes_back_goes_before_new_ones(clock: Clock) -> None:
    """From the first time that an editor is looked for; a new one does not until it has had one."""
    for again in (False, True):
        session = make(opened=False)
        session.opening = replace(session.opening, again=again)
        _, backend, _ = driven(clock, session, [LOST], [READY, "take"], seconds=5.0)
        assert [opening.again for opening in backend.openings] == [again, again]


def test_after_a_delivery_all_begins_anew(clock: Clock) -> None:
    """The pauses, and what an editor that left had ahead in its state."""
    session = make(opened=False)
    feed(session, 9 + 4)
    known = (PARTS[0].name,)  # of what an editor gives back its front has that
    events, backend, metrics = driven(
        clock, session,
        [LOST], [LOST],
        [READY, "take", "edit", "take", Moved(SplitState(b"moved", known, ()), 4, "drain")],
        [READY, lambda: feed(session, 8 + 4), "take", "edit", "take", LOST],
        [READY, "take", "take"], seconds=10.0,
    )  # fmt: skip
    assert [type(event) for event in events] == [Ready, *[Frames, Delivery] * 2]
    assert [len(work.frames) for work in backend.works] == [9, 4, 8, 4, 4]
    assert backend.works[-1] is backend.works[-2]  # which its editor died of, and nothing else
    assert [o.state for o in backend.openings] == [
        None,
        None,
        None,
        SplitState(b"moved", known, PARTS[:1]),
        SplitState(b"state 2", known, PARTS[:1]),
    ]
    # What was given back goes on at once, and who dies later is looked for as soon as the first.
    assert backend.at == [0.0, 0.1, 0.3, 0.3, 0.4]
    moved = metrics.moved
    assert [moved.labels(why)._value.get() for why in ("death", "drain")] == [1, 1]


def test_who_went_on_has_as_long_again_when_its_next_editor_dies(clock: Clock) -> None:
    session = make(opened=False)
    feed(session, 9)
    events, backend, _ = driven(
        clock, session,
        [READY, "take", LOST], [READY, "take", "edit", RECOVERY_S + 1.0, LOST], [READY, "take"],
    )  # fmt: skip
    assert [type(event) for event in events] == [Ready, Frames, Delivery]
    assert backend.at == [0.0, 0.1, 0.2 + RECOVERY_S + 1.0]
