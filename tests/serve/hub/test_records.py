from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from serve.hub.records import (
    HOLDER_BEAT_S,
    MAX_TAIL,
    MIN_TAIL_FRAMES,
    Commit,
    Entry,
    Header,
    Progress,
    Record,
    SessionStore,
    Shape,
)  # fmt: skip
from serve.wire.protocol import WireError
from serve.wire.split_state import HistoryPart, LostPartError, SplitState
from serve.wire.work import Opening, Ready
from tests.serve.clock import Clock

pytestmark = pytest.mark.anyio

HEADER = Header(Opening("s", "red", 48, 32, 16.0, "lossless"), "jpeg", Ready("m", 12, 9, 0))


@pytest.fixture
def clock() -> Clock:
    return Clock(0.0)


@pytest.fixture
def store(clock: Clock) -> SessionStore:
    return SessionStore(60.0, clock=clock)


def frames(first: int, count: int, size: int = 10) -> list[Entry]:
    return [Entry(n, bytes(size)) for n in range(first, first + count)]


STATE = SplitState(b"state")


def progress(edited: int, state: SplitState = STATE) -> Progress:
    return Progress(edited, edited, "red", "red", state)


async def test_a_claim_gives_what_the_client_lacks(store: SessionStore) -> None:
    token = await store.create(HEADER)
    assert await store.commit(
        Commit(token, 0, HEADER, progress(9), [*frames(0, 9), Entry(9, "chunk")])
    )
    record = await store.claim(token, 4)
    assert [entry.position for entry in record.tail] == [4, 5, 6, 7, 8, 9]
    assert record.progress == progress(9)
    assert (await store.claim(token, 9)).tail[0].data == "chunk"


async def test_who_claims_last_holds_the_session(store: SessionStore) -> None:
    token = await store.create(HEADER)
    second = await store.claim(token, 0)
    assert second.epoch == 1
    assert not await store.commit(Commit(token, 0, HEADER, progress(9), frames(0, 9)))
    assert await store.beat([(token, 0), (token, 1)]) == [(token, 0)]
    await store.release(token, 0, forget=True)
    assert await store.commit(Commit(token, 1, HEADER, progress(9), frames(0, 9)))
    assert await store.beat([(token, 1)]) == []


async def test_a_lost_connection_is_kept_for_resume_s(store: SessionStore, clock: Clock) -> None:
    token = await store.create(HEADER)
    clock.now = 1000.0
    await store.beat([(token, 0)])
    await store.release(token, 0)
    clock.now = 1059.0
    assert (await store.claim(token, 0)).epoch == 1
    await store.release(token, 1)
    clock.now = 1120.0
    with pytest.raises(WireError, match="unknown or older than 60 s") as raised:
        await store.claim(token, 0)
    assert raised.value.code == "bad_request"
    assert len(store) == 0


async def test_a_dead_fronts_sessions_are_kept_as_long(store: SessionStore, clock: Clock) -> None:
    token = await store.create(HEADER)
    clock.now = 70.0
    assert (await store.claim(token, 0)).epoch == 1
    clock.now = 200.0
    assert len(store) == 0


@pytest.mark.parametrize("received", [10, 4000])
async def test_more_than_was_edited_cannot_have_been_received(
    store: SessionStore, received: int
) -> None:
    token = await store.create(HEADER)
    await store.commit(Commit(token, 0, HEADER, progress(9), frames(0, 9)))
    with pytest.raises(WireError, match=str(received)):
        await store.claim(token, received)


async def test_the_tail_is_bounded(store: SessionStore) -> None:
    token = await store.create(HEADER)
    size = MAX_TAIL // 100
    for first in range(0, 1200, 12):
        await store.commit(Commit(token, 0, HEADER, progress(first + 12), frames(first, 12, size)))
    record = await store.claim(token, 1150)
    assert [e.position for e in record.tail] == list(range(1150, 1200))
    with pytest.raises(WireError, match="can go on from"):
        await store.claim(token, 900)
    huge = await store.create(HEADER)
    for first in range(0, 240, 12):
        await store.commit(
            Commit(huge, 0, HEADER, progress(first + 12), frames(first, 12, MAX_TAIL // 4))
        )
    assert (await store.claim(huge, 240 - MIN_TAIL_FRAMES)).epoch == 1


async def test_a_store_that_was_started_anew_takes_running_sessions(store: SessionStore) -> None:
    assert await store.commit(Commit("token", 3, HEADER, progress(45), frames(33, 12)))
    assert (await store.claim("token", 40)).epoch == 4


@pytest.mark.parametrize(("after", "taken"), [(60.0, True), (60.001, False)])
async def test_the_time_to_resume_is_counted_from_the_release(
    store: SessionStore, clock: Clock, after: float, taken: bool
) -> None:
    token = await store.create(HEADER)
    clock.now = 500.0
    await store.beat([(token, 0)])
    clock.now = 507.0
    await store.release(token, 0)
    clock.now = 507.0 + after
    assert (len(store) == 1) is taken


@pytest.mark.parametrize(("after", "taken"), [(80.0, True), (80.001, False)])
@pytest.mark.parametrize("sign", ["create", "claim", "commit", "beat"])
async def test_a_holders_every_sign_of_life_counts(
    store: SessionStore, clock: Clock, sign: str, after: float, taken: bool
) -> None:
    """Of a front that died: two beats and the client's minute after the last."""
    token = await store.create(HEADER)
    if sign != "create":
        clock.now = 70.0
    if sign == "claim":
        clock.now = 20.0
        await store.release(token, 0)  # it was left, and is held again
        clock.now = 70.0
        await store.claim(token, 0)
    elif sign == "commit":
        await store.commit(Commit(token, 0, HEADER, progress(9), frames(0, 9)))
    elif sign == "beat":
        await store.beat([(token, 0)])
    clock.now += after
    assert (len(store) == 1) is taken


async def test_a_lost_holders_beat_keeps_nothing(store: SessionStore, clock: Clock) -> None:
    token = await store.create(HEADER)
    await store.claim(token, 0)
    clock.now = 70.0
    assert await store.beat([(token, 0), ("unknown", 0)]) == [(token, 0)]
    clock.now = 81.0
    assert await store.beat([]) == []
    assert not store._records  # gone at any front's next word, not when somebody looks


@pytest.mark.parametrize(
    ("name", "other"),
    [("width", 64), ("height", 48), ("mode", "live"), ("format", "png"), ("work_size", "24x16"),
     ("detail", "source"), ("model", "another")],
)  # fmt: skip
async def test_who_comes_back_says_what_it_opened_with(
    store: SessionStore, name: str, other: Any
) -> None:
    opening = replace(HEADER.opening, work_size="48x32", model="one", tenant="acme")
    token = await store.create(replace(HEADER, opening=opening))
    first = Shape(48, 32, "lossless", "jpeg", "48x32", "off", "acme", "one")
    with pytest.raises(WireError, match=f"has {name} '?{getattr(first, name)}") as raised:
        await store.claim(token, 0, replace(first, **{name: other}))
    assert raised.value.code == "bad_request"
    silent = replace(first, work_size=None, detail=None, model=None)
    assert [(await store.claim(token, 0, shape)).epoch for shape in (first, silent)] == [1, 2]


async def test_the_tail_is_kept_to_the_byte_and_the_frame(store: SessionStore) -> None:
    token = await store.create(HEADER)
    size = MAX_TAIL // 64  # 64 frames fill it
    await store.commit(Commit(token, 0, HEADER, progress(64), frames(0, 64, size)))
    assert len((await store.claim(token, 0)).tail) == 64
    await store.commit(Commit(token, 1, HEADER, progress(65), frames(64, 1, size)))
    assert (await store.claim(token, 1)).tail[0].position == 1
    with pytest.raises(WireError, match="from 1 to 65"):
        await store.claim(token, 0)
    # Of large frames 48 are kept, whatever they hold.
    await store.commit(Commit(token, 2, HEADER, progress(66), frames(65, 1, 2 * MAX_TAIL)))
    assert (await store.claim(token, 18)).tail[0].position == 18
    with pytest.raises(WireError, match="from 18 to 66"):
        await store.claim(token, 17)
    # And when smaller ones come again the large one goes, and is counted out.
    await store.commit(Commit(token, 3, HEADER, progress(126), frames(66, 60, 10)))
    assert (await store.claim(token, 66)).tail[0].position == 66
    await store.commit(Commit(token, 4, HEADER, progress(186), frames(126, 60, 10)))
    assert (await store.claim(token, 66)).tail[0].position == 66


async def test_all_records_together_are_kept_to_the_byte() -> None:
    store = SessionStore(60.0, max_bytes=100, clock=lambda: 0.0)
    token = await store.create(HEADER)
    await store.commit(Commit(token, 0, HEADER, progress(2), frames(0, 2, 40)))
    assert store.bytes == STATE.size + 80 <= 100
    room = 100 - store.bytes
    await store.commit(Commit(token, 0, HEADER, progress(3), frames(2, 1, room)))
    assert store.bytes == 100
    assert (await store.claim(token, 0)).tail[0].position == 0
    await store.commit(Commit(token, 1, HEADER, progress(4), frames(3, 1, 1)))
    assert store.bytes == 61
    assert (await store.claim(token, 1)).tail[0].position == 1


@pytest.mark.parametrize(("held", "patience"), [(False, 60.0), (True, 60.0 + 2 * HOLDER_BEAT_S)])
async def test_a_record_lives_for_as_long_as_it_says(
    store: SessionStore, clock: Clock, held: bool, patience: float
) -> None:
    token = await store.create(HEADER)
    if not held:
        await store.release(token, 0)
    clock.now += patience
    assert len(store) == 1
    clock.now += 0.001
    assert len(store) == 0


async def test_received_is_tried_at_its_borders(store: SessionStore) -> None:
    token = await store.create(HEADER)
    await store.commit(Commit(token, 0, HEADER, progress(9), frames(0, 9)))
    assert len((await store.claim(token, 9)).tail) == 0
    assert len((await store.claim(token, 8)).tail) == 1
    for wrong in (10, -1):
        with pytest.raises(WireError) as raised:
            await store.claim(token, wrong)
        assert raised.value.code == "bad_request"
    assert (await store.claim(token, 0)).epoch == 3  # what was refused claimed nothing


async def test_tokens_cannot_be_guessed(store: SessionStore) -> None:
    tokens = {await store.create(HEADER) for _ in range(200)}
    assert len(tokens) == 200
    assert min(map(len, tokens)) >= 32


async def test_a_record_made_again_has_its_holders_epoch(store: SessionStore) -> None:
    assert await store.commit(Commit("token", 3, HEADER, progress(45), frames(33, 12)))
    assert await store.commit(Commit("token", 3, HEADER, progress(57), frames(45, 12)))
    assert not await store.commit(Commit("token", 2, HEADER, progress(57), frames(45, 12)))


async def test_a_commit_that_is_said_twice_is_taken_once(store: SessionStore) -> None:
    """Its answer was lost on the way, so the holder says it again."""
    token = await store.create(HEADER)
    first = Commit(token, 0, HEADER, progress(9), frames(0, 9), number=5)
    second = Commit(token, 0, HEADER, progress(21), frames(9, 12), number=6)
    for commit in (first, first, second, first, second):
        assert await store.commit(commit)
    record = await store.claim(token, 0)
    assert [entry.position for entry in record.tail] == list(range(21))
    assert record.progress.edited == 21
    # Who holds it next counts by itself.
    assert await store.commit(Commit(token, 1, HEADER, progress(33), frames(21, 12), number=1))
    assert (await store.claim(token, 21)).progress.edited == 33


async def test_nobody_resumes_before_frames_that_were_never_committed(store: SessionStore) -> None:
    """Of a store that could not be reached for a chunk."""
    token = await store.create(HEADER)
    await store.commit(Commit(token, 0, HEADER, progress(9), frames(0, 9)))
    await store.commit(Commit(token, 0, HEADER, progress(33), frames(21, 12)))
    with pytest.raises(WireError, match="from 21 to 33"):
        await store.claim(token, 20)
    assert [e.position for e in (await store.claim(token, 21)).tail] == list(range(21, 33))
    assert store.bytes == 12 * 10 + len(b"state")
    await store.commit(Commit(token, 1, HEADER, progress(45), []))
    with pytest.raises(WireError, match="from 45 to 45"):
        await store.claim(token, 33)


async def test_a_store_that_was_started_anew_believes_a_newer_holder(store: SessionStore) -> None:
    """An older front may have told it of the session first."""
    assert await store.commit(Commit("token", 0, HEADER, progress(9), frames(0, 9), number=70))
    assert await store.commit(Commit("token", 1, HEADER, progress(21), frames(9, 12), number=3))
    assert not await store.commit(Commit("token", 0, HEADER, progress(21), frames(9, 12), 71))
    record = await store.claim("token", 9)
    assert (record.epoch, record.progress.edited) == (2, 21)


@pytest.mark.parametrize(
    ("after", "code"), [(0.0, "at_capacity"), (9.99, "at_capacity"), (10.0, "bad_request")]
)
async def test_who_comes_to_a_new_store_too_early_comes_back(
    clock: Clock, after: float, code: str
) -> None:
    store = SessionStore(60.0, gather_s=10.0, clock=clock)
    await store.commit(Commit("known", 0, HEADER, progress(9), frames(0, 9)))
    clock.now += after
    with pytest.raises(WireError) as raised:
        await store.claim("unknown", 0)
    assert raised.value.code == code
    assert (await store.claim("known", 9)).epoch == 1


async def test_a_commit_keeps_the_store_within_its_memory(clock: Clock) -> None:
    store = SessionStore(60.0, max_bytes=1000, clock=clock)
    token = await store.create(HEADER)
    for first in range(0, 40, 4):
        assert await store.commit(
            Commit(token, 0, HEADER, progress(first + 4), frames(first, 4, size=50))
        )
        assert store.bytes <= 1000
    assert (await store.claim(token, 36)).tail[-1].position == 39  # what is newest stays


async def test_room_is_made_by_one_look_at_all_records(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many entries have to go: a hub at its limit makes room at every commit."""
    store, looks = SessionStore(60.0, max_bytes=40 * 12 * 10, clock=clock), 0
    tokens = [await store.create(HEADER) for _ in range(40)]
    nothing = SplitState(b"")
    for token in tokens:
        await store.commit(Commit(token, 0, HEADER, progress(12, nothing), frames(0, 12)))
    assert store.bytes == store.max_bytes

    def tenant(record: Record) -> str:
        nonlocal looks
        looks += 1
        return ""

    monkeypatch.setattr(Record, "tenant", property(tenant))
    await store.commit(Commit(tokens[0], 0, HEADER, progress(36, nothing), frames(12, 24)))
    assert 24 <= looks <= 40 + 3 * 24
    assert store.bytes == store.max_bytes
    lengths = sorted(len(store._records[token].tail) for token in tokens)
    assert lengths[-1] - lengths[0] <= 1
    assert sum(lengths) == 40 * 12


async def test_the_longest_tails_are_cut_first_in_whatever_order_they_came() -> None:
    store, nothing = SessionStore(60.0, max_bytes=54 * 10, clock=lambda: 0.0), SplitState(b"")
    tokens = [await store.create(HEADER) for _ in range(6)]
    for token, n in zip(tokens, (2, 9, 4, 12, 7, 20), strict=True):
        await store.commit(Commit(token, 0, HEADER, progress(n, nothing), frames(0, n)))
    kept = []
    for n in (2, 9):  # it comes to 9, and to 16
        await store.commit(Commit(tokens[0], 0, HEADER, progress(n + 7, nothing), frames(n, 7)))
        kept.append(sorted(len(store._records[token].tail) for token in tokens))
    assert kept == [[4, 7, 9, 9, 12, 13], [4, 7, 9, 11, 11, 12]]


async def test_what_lacks_a_part_changes_nothing(store: SessionStore) -> None:
    """So that its front sends it again, whole."""
    one, two = HistoryPart.of(b"one"), HistoryPart.of(b"two")
    whole = SplitState(b"rest", (one.name, two.name), (one, two))
    token = await store.create(HEADER)
    before = progress(9, SplitState(b"", (one.name,), (one,)))
    assert await store.commit(Commit(token, 0, HEADER, before, frames(0, 9)))
    for lacking in (token, "of another hub"):
        with pytest.raises(LostPartError, match=two.name):
            await store.commit(
                Commit(lacking, 0, HEADER, progress(21, whole.beyond([two.name])), frames(9, 12))
            )
    assert (len(store), store.bytes) == (1, 90 + len(b"one"))
    new = whole.beyond([one.name])
    assert await store.commit(Commit(token, 0, HEADER, progress(21, new), frames(9, 12)))
    record = await store.claim(token, 0)
    assert (record.progress.state, len(record.tail)) == (whole, 21)
    assert store.bytes == 210 + len(b"restonetwo")


async def test_who_is_held_is_forgotten_last(clock: Clock) -> None:
    """However long it has said nothing, and however short ago another was left."""
    store = SessionStore(60.0, max_bytes=50, clock=clock)
    held, left, longer = [await store.create(HEADER) for _ in range(3)]
    for token in (held, left, longer):
        assert await store.commit(Commit(token, 0, HEADER, progress(9, SplitState(b"s" * 20)), []))
        clock.now += 1.0
        if token != held:
            await store.release(token, 0)
    assert [token in store._records for token in (held, left, longer)] == [True, False, True]
    newest = await store.create(HEADER)
    assert await store.commit(Commit(newest, 0, HEADER, progress(9, SplitState(b"s" * 20)), []))
    assert [token in store._records for token in (held, longer, newest)] == [True, False, True]
    last = await store.create(HEADER)
    assert await store.commit(Commit(last, 0, HEADER, progress(9, SplitState(b"s" * 20)), []))
    assert [token in store._records for token in (held, newest, last)] == [False, True, True]
