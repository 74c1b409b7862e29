"""A session across editors."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import numpy as np
import pytest

from serve.delivery.driver import MAX_DEATHS, drive
from serve.delivery.session import Delivery, Session
from serve.metrics import Metrics
from serve.wire.protocol import WireError
from serve.wire.work import Edited, EditorEvent, EditorLostError, Opening, Ready, Take


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
        yield Edited(work.number, 0, work.frames, 1.0, 4, 1.0, 0.0, 0.0, None, b"state")


@pytest.mark.anyio
async def test_who_had_no_work_did_not_die_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.delivery.driver.FIRST_PAUSE_S", 0.001)
    backend, session = Starting(), fed_session()
    events = drive(backend, session, Metrics())
    assert isinstance(await anext(events), Ready)
    assert isinstance(await anext(events), Delivery)
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
            yield Edited(work.number, 0, work.frames, 1.0, 4, 1.0, 0.0, 0.0, None, b"state")
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
