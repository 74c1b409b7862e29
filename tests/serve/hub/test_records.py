from __future__ import annotations

import pytest

from serve.hub.records import MAX_TAIL, MIN_TAIL_FRAMES, Entry, Header, Progress, SessionStore
from serve.wire.protocol import WireError
from serve.wire.work import Opening, Ready

HEADER = Header(Opening("s", "red", 48, 32, 16.0, "lossless"), "jpeg", Ready("m", 12, 9, 0))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> SessionStore:
    return SessionStore(60.0, clock=clock)


def frames(first: int, count: int, size: int = 10) -> list[Entry]:
    return [Entry(n, bytes(size)) for n in range(first, first + count)]


def progress(edited: int, state: bytes = b"state") -> Progress:
    return Progress(edited, edited, "red", "red", state)


def test_a_claim_gives_what_the_client_lacks(store: SessionStore) -> None:
    token = store.create(HEADER)
    assert store.commit(token, 0, HEADER, progress(9), [*frames(0, 9), Entry(9, "chunk")])
    record = store.claim(token, 4)
    assert [entry.position for entry in record.tail] == [4, 5, 6, 7, 8, 9]
    assert record.progress == progress(9)
    assert store.claim(token, 9).tail[0].data == "chunk"


def test_who_claims_last_holds_the_session(store: SessionStore) -> None:
    token = store.create(HEADER)
    second = store.claim(token, 0)
    assert second.epoch == 1
    assert not store.commit(token, 0, HEADER, progress(9), frames(0, 9))
    assert store.beat([(token, 0)]) == [token]
    store.release(token, 0, forget=True)
    assert store.commit(token, 1, HEADER, progress(9), frames(0, 9))
    assert store.beat([(token, 1)]) == []


def test_a_lost_connection_is_kept_for_resume_s(store: SessionStore, clock: Clock) -> None:
    token = store.create(HEADER)
    clock.now = 1000.0
    store.beat([(token, 0)])
    store.release(token, 0)
    clock.now = 1059.0
    assert store.claim(token, 0).epoch == 1
    store.release(token, 1)
    clock.now = 1120.0
    with pytest.raises(WireError, match="unknown or older than 60 s") as raised:
        store.claim(token, 0)
    assert raised.value.code == "bad_request"
    assert len(store) == 0


def test_a_dead_fronts_sessions_are_kept_as_long(store: SessionStore, clock: Clock) -> None:
    token = store.create(HEADER)
    clock.now = 70.0
    assert store.claim(token, 0).epoch == 1
    clock.now = 200.0
    assert len(store) == 0


@pytest.mark.parametrize("received", [10, 4000])
def test_more_than_was_edited_cannot_have_been_received(store: SessionStore, received: int) -> None:
    token = store.create(HEADER)
    store.commit(token, 0, HEADER, progress(9), frames(0, 9))
    with pytest.raises(WireError, match=str(received)):
        store.claim(token, received)


def test_the_tail_is_bounded(store: SessionStore) -> None:
    token = store.create(HEADER)
    size = MAX_TAIL // 100
    for first in range(0, 1200, 12):
        store.commit(token, 0, HEADER, progress(first + 12), frames(first, 12, size))
    record = store.claim(token, 1150)
    assert [e.position for e in record.tail] == list(range(1150, 1200))
    with pytest.raises(WireError, match="can go on from"):
        store.claim(token, 900)
    huge = store.create(HEADER)
    for first in range(0, 240, 12):
        store.commit(huge, 0, HEADER, progress(first + 12), frames(first, 12, MAX_TAIL // 4))
    assert store.claim(huge, 240 - MIN_TAIL_FRAMES).epoch == 1


def test_a_store_that_was_started_anew_takes_running_sessions(store: SessionStore) -> None:
    assert store.commit("token", 3, HEADER, progress(45), frames(33, 12))
    assert store.claim("token", 40).epoch == 4
