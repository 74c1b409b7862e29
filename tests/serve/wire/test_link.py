"""The inner ports: what passes through them unchanged, and who is not let in."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from serve.hub import commits
from serve.hub.commits import CommitClient, CommitServer
from serve.hub.records import Entry, Header, Progress, SessionStore
from serve.wire import link
from serve.wire.link import MAX_HEADER, EditorLink, Inbox, Link, Slot
from serve.wire.work import Edited, EditorLostError, Moved, Opening, Ready, Work

pytestmark = pytest.mark.anyio

HOST = "127.0.0.1"


def other(secret: Any) -> list[Any]:
    """Secrets of the same length that are wrong at their end, at their beginning, in all."""
    end, start = secret[-1:], secret[:1]
    a, b = ("0", "1") if isinstance(secret, str) else (b"0", b"1")
    return [
        secret[:-1] + (b if end == a else a),
        (b if start == a else a) + secret[1:],
        secret[::-1],
    ]


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    for field in fields(a):
        here, there = getattr(a, field.name), getattr(b, field.name)
        if isinstance(there, np.ndarray):
            assert here.dtype == there.dtype
            np.testing.assert_array_equal(here, there)
        else:
            assert here == there, field.name


@asynccontextmanager
async def joined() -> AsyncIterator[tuple[Inbox, Slot, EditorLink]]:
    inbox = Inbox(HOST)
    slot = await inbox.open("stream-0")
    editor = await EditorLink.connect(slot.address)
    await slot.connected()
    try:
        yield inbox, slot, editor
    finally:
        editor.close()
        inbox.close(slot)


WORKS = [
    Work(0, "make it red", pixels(9), last=False),
    Work(7, "ünïcode ☃\n", pixels(4, 1), last=False, more=True),
    Work(2**31, "", pixels(3, 2)[:, ::-1, :, ::-1], last=True),  # not contiguous
    Work(3, "p", pixels(0), last=True),
]
MASK = np.random.default_rng(3).random((3, 5, 7)) < 0.4
EDITED = Edited(5, 4, pixels(12, 4), 0.25, 4, 41.5, 7.25, 0.5, MASK, b"\x00state")
EVENTS = [
    EDITED,
    replace(EDITED, mask=None, state=None),
    replace(EDITED, mask=None, state=b""),
    replace(EDITED, state=None, mask=np.zeros((1, 1, 1), bool), frames=pixels(0)),
    Moved(b"exact" * 1000, ahead=8),
    Moved(b"", ahead=0),
]


@pytest.mark.parametrize("work", WORKS, ids=range(len(WORKS)))
async def test_work_arrives_as_it_was_given_out(work: Work) -> None:
    async with joined() as (_, slot, editor):
        taking = asyncio.create_task(editor.take())
        assert await slot.next() is None  # the editor has room
        await slot.put(work)
        same(await taking, work)


@pytest.mark.parametrize("event", EVENTS, ids=range(len(EVENTS)))
async def test_answers_arrive_as_they_were_given(event: Edited | Moved) -> None:
    async with joined() as (_, slot, editor):
        await editor.send(event)
        same(await slot.next(), event)


async def test_nobody_without_the_secret_is_let_in() -> None:
    inbox = Inbox(HOST)
    slot = await inbox.open("stream-0")
    for wrong in other(slot.address.secret):
        stranger = await EditorLink.connect(replace(slot.address, secret=wrong))
        with pytest.raises(ConnectionError):
            await stranger.take()
        assert not slot.link.done()
    another = await inbox.open("stream-1")
    assert another.address.secret != slot.address.secret
    editor = await EditorLink.connect(slot.address)
    await slot.connected()
    # One editor has a stream: a second with the same secret is let go of.
    late = await EditorLink.connect(slot.address)
    with pytest.raises(ConnectionError):
        await late.take()
    await editor.send(Moved(b"state", 0))
    assert await slot.next() == Moved(b"state", 0)
    assert not another.link.done()
    for used in (slot, another):
        inbox.close(used)


async def test_an_editor_sees_that_its_stream_was_let_go() -> None:
    async with joined() as (inbox, slot, editor):
        taking = asyncio.create_task(editor.take())
        await slot.next()
        inbox.close(slot)
        with pytest.raises(ConnectionError, match="let go of the stream"):
            await taking
        late = await EditorLink.connect(slot.address)
        with pytest.raises(ConnectionError):
            await late.take()


async def test_a_front_sees_that_its_editor_died() -> None:
    async with joined() as (_, slot, editor):
        editor.close()
        with pytest.raises(EditorLostError, match="connection closed"):
            await slot.next()


async def test_an_editor_that_does_not_come_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "HELLO_S", 0.05)
    inbox = Inbox(HOST)
    slot = await inbox.open("stream-0")
    with pytest.raises(EditorLostError, match="did not connect"):
        await slot.connected()
    inbox.close(slot)


@pytest.mark.parametrize("size", [MAX_HEADER + 1, 2**32 - 1])
async def test_a_header_is_bounded(size: int) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack("<I", size) + b"{}")
    with pytest.raises(ConnectionError, match=f"{size} bytes"):
        await Link(reader, None).read()  # type: ignore[arg-type]


# --- commits


HEADER = Header(
    Opening("s", "red ☃", 48, 32, 16.5, "live", seed=3, mask=True), "webp", Ready("m", 12, 9, 0)
)
PROGRESS = Progress(21, 20, "newest", "applied", b"\x00state", dropped=((24, 3), (40, 1)))
ENTRIES = [Entry(9, '{"type":"chunk"}'), Entry(9, b"\x00image"), Entry(10, "ü"), Entry(10, b"")]


@asynccontextmanager
async def hub(store: SessionStore) -> AsyncIterator[CommitServer]:
    server = CommitServer(store, HOST)
    await server.address()
    try:
        yield server
    finally:
        assert server._server is not None
        server._server.close()


@pytest.mark.parametrize(
    "progress",
    [PROGRESS, replace(PROGRESS, state=None, finished="close"), replace(PROGRESS, state=b"")],
)
async def test_a_commit_over_the_port_is_a_commit(progress: Progress) -> None:
    here, there = SessionStore(), SessionStore()
    async with hub(there) as server:
        client = CommitClient(server.address)
        # Of a session that the store does not know (it was started anew): made again, whole.
        assert await client.commit("token", 4, HEADER, progress, ENTRIES)
        assert here.commit("token", 4, HEADER, progress, ENTRIES)
        assert not await client.commit("token", 3, HEADER, PROGRESS, ENTRIES)
        assert not await client.commit("token", 5, HEADER, PROGRESS, ENTRIES)
        assert await client.commit("token", 4, HEADER, progress, [])
    mine, theirs = here.claim("token", progress.edited), there.claim("token", progress.edited)
    assert theirs.header == mine.header == HEADER
    assert theirs.progress == mine.progress == progress
    assert theirs.epoch == mine.epoch == 5
    assert [tuple(vars(e).values()) for e in there._records["token"].tail] == [
        tuple(vars(e).values()) for e in ENTRIES
    ]


async def test_nobody_without_the_secret_writes_a_record() -> None:
    store = SessionStore()
    async with hub(store) as server:
        right = await server.address()
        for wrong in other(right.secret):

            async def find(wrong: Any = wrong) -> commits.CommitAddress:
                return replace(right, secret=wrong)

            with pytest.raises(OSError):  # noqa: PT011 - of whatever kind
                await CommitClient(find).commit("token", 0, HEADER, PROGRESS, ENTRIES)
        assert len(store) == 0


async def test_a_hub_that_was_started_again_is_found_again() -> None:
    stores = [SessionStore(), SessionStore()]
    asked = 0

    async with hub(stores[0]) as first, hub(stores[1]) as second:

        async def find() -> commits.CommitAddress:
            nonlocal asked
            asked += 1
            return await (first if asked == 1 else second).address()

        client = CommitClient(find)
        assert await client.commit("token", 0, HEADER, PROGRESS, ENTRIES)
        assert await client.commit("token", 0, HEADER, PROGRESS, [])
        assert asked == 1
        assert client._link is not None
        client._link.close()
        assert await client.commit("token", 0, HEADER, PROGRESS, ENTRIES)
        assert asked == 2
    assert [len(store) for store in stores] == [1, 1]


async def test_a_hub_that_is_gone_is_an_os_error() -> None:
    async with hub(SessionStore()) as server:
        address = await server.address()

    async def find() -> commits.CommitAddress:
        return address

    with pytest.raises(OSError):  # noqa: PT011 - of whatever kind
        await CommitClient(find).commit("token", 0, HEADER, PROGRESS, ENTRIES)


async def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next() -> None:
    store = SessionStore()
    async with hub(store) as server:
        client = CommitClient(server.address)
        assert await client.commit("token", 1, HEADER, PROGRESS, [])
        for steps in range(12):
            given_up = asyncio.create_task(client.commit("token", 0, HEADER, PROGRESS, []))
            for _ in range(steps):
                await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            assert await client.commit("token", 1, HEADER, PROGRESS, [])


async def test_commits_of_many_sessions_do_not_mix() -> None:
    store = SessionStore()
    async with hub(store) as server:
        client = CommitClient(server.address)
        answers = await asyncio.gather(
            *(
                client.commit(str(n % 10), n // 10, HEADER, replace(PROGRESS, edited=n), [])
                for n in range(20)
            )
        )
    assert answers == [True] * 10 + [False] * 10
    assert [store.claim(str(n), n).progress.edited for n in range(10)] == list(range(10))
