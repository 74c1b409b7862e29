"""The inner ports: what passes through them unchanged, and who is not let in."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields, make_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from serve.hub.records import COMMIT_KINDS, Commit, Entry, Header, Progress, SessionStore
from serve.limits import Limits
from serve.wire import link
from serve.wire.conversation import KINDS
from serve.wire.link import MAX_HEADER, Address, Asker, Link, Listener
from serve.wire.pack import dialect, pack
from serve.wire.protocol import Error, PromptApplied, to_json
from serve.wire.split_state import HistoryPart, SplitState
from serve.wire.work import Asks, Edited, Frames, Moved, Opening, Ready, Superseded, Work

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
async def joined() -> AsyncIterator[tuple[Listener, Address, Link, Link]]:
    """A listener, and the two ends of a connection to it: here first, then the one who came."""
    listener, here = Listener(HOST, KINDS), asyncio.Queue[Link]()
    address = await listener.expect(here.put)
    there = await Link.connect(address, KINDS)
    came = await here.get()
    try:
        yield listener, address, came, there
    finally:
        for end in (came, there, listener):
            end.close()


WORKS = [
    Work(0, "make it red", pixels(9), last=False),
    Work(7, "ünïcode ☃\n", pixels(4, 1), last=False, more=True),
    Work(2**31, "", pixels(3, 2)[:, ::-1, :, ::-1], last=True),  # not contiguous
    Work(3, "p", pixels(0), last=True),
    Work(4, "p", pixels(2, 3)[..., :1], last=True),  # every third byte, in a row
]
MASK = np.random.default_rng(3).random((3, 5, 7)) < 0.4
PART = HistoryPart.of(bytes(range(256)))
STATE = SplitState(b"\x00state", (PART.name, "there", PART.name), (PART,))
EDITED = Edited(5, 4, 0.25, 4, 41.5, 7.25, 0.5, MASK, STATE)
MESSAGES = [
    *WORKS,
    Asks(),
    Ready("m version 3", 12, 9, 7),
    Superseded(),
    Error("at_capacity", "no room", 5.0),
    Error("internal", "it failed"),
    Frames(pixels(12, 4)),
    Frames(pixels(0)),
    EDITED,
    replace(EDITED, mask=None, state=None, unknown="snow, monet"),
    replace(EDITED, mask=None, state=SplitState(b"")),
    replace(EDITED, state=None, mask=np.zeros((1, 1, 1), bool)),
    Moved(SplitState(b"exact" * 1000), ahead=8),
    Moved(SplitState(b""), ahead=0),
]


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
async def test_a_message_arrives_as_it_was_said(message: Any) -> None:
    async with joined() as (_, _, here, there):
        for one, other_end in ((here, there), (there, here)):
            _, heard = await asyncio.gather(one.write(message), other_end.read())
            same(heard, message)


async def test_who_says_more_than_is_heard_waits() -> None:
    """Else it would be kept here, without bound."""
    async with joined() as (_, _, here, there):
        frames = Frames(np.zeros((8, 512, 512, 3), np.uint8))
        for one, other_end in ((here, there), (there, here)):
            writing = asyncio.gather(*(one.write(frames) for _ in range(4)))
            await asyncio.sleep(0.02)
            assert not writing.done()
            for _ in range(4):
                await other_end.read()
            await writing


async def test_an_end_that_is_silent_is_lost_in_time() -> None:
    """By the kernel's word, idle or not, whichever end connected; tests/hosts cuts real ones."""
    async with joined() as (_, _, here, there):
        for end in (here, there):
            connection = end._pipe.transport.get_extra_info("socket")
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            tcp = partial(connection.getsockopt, socket.IPPROTO_TCP)
            idle = tcp(socket.TCP_KEEPIDLE) + tcp(socket.TCP_KEEPCNT) * tcp(socket.TCP_KEEPINTVL)
            assert idle == 5
            assert tcp(socket.TCP_USER_TIMEOUT) == 4000


async def test_nobody_without_the_secret_is_let_in() -> None:
    async with joined() as (listener, address, *_):
        came: list[Link] = []

        async def another(link: Link) -> None:
            came.append(link)

        second = await listener.expect(another)
        assert second.secret != address.secret
        for wrong in other(second.secret):
            stranger = await Link.connect(replace(second, secret=wrong), KINDS)
            with pytest.raises(ConnectionError, match="closed the connection"):
                await stranger.read()
        assert came == []
        listener.forget(second)
        late = await Link.connect(second, KINDS)
        with pytest.raises(ConnectionError, match="closed the connection"):
            await late.read()
        assert came == []


async def test_another_version_of_the_code_is_not_let_in() -> None:
    """Its messages would be misunderstood in the middle of a session."""
    told = [(field.name, field.type) for field in fields(SplitState)]
    name, kind = told[0]
    forms = [[("state", kind), *told[1:]], [(name, "str"), *told[1:]], told[1:], told[::-1]]
    befores = [make_dataclass("SplitState", form, frozen=True) for form in forms]
    same = [k for k in KINDS if k != SplitState]
    others = [KINDS[1:], (*KINDS, Entry), *((*same, before) for before in befores)]
    async with joined() as (listener, *_):
        came: list[Link] = []

        async def another(link: Link) -> None:
            came.append(link)

        address = await listener.expect(another)
        for kinds in others:
            stranger = await Link.connect(address, kinds)
            with pytest.raises(ConnectionError, match="closed the connection"):
                await asyncio.wait_for(stranger.read(), 20)
        assert came == []
    assert dialect(KINDS) == dialect(reversed(KINDS))


async def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with joined() as (_, address, *_):
        monkeypatch.setattr(link, "HELLO_S", 0.05)
        reader, writer = await asyncio.open_connection(HOST, address.port)
        writer.write(address.secret[:-1])
        assert await asyncio.wait_for(reader.read(1), 2) == b""
        writer.close()


async def test_either_end_sees_that_the_other_closed() -> None:
    for closes in (0, 1):
        async with joined() as (_, _, *ends):
            ends[closes].close()
            with pytest.raises(ConnectionError, match="closed the connection"):
                await ends[1 - closes].read()


async def test_only_messages_of_the_connections_kinds_come_out() -> None:
    async with joined() as (_, _, here, there):
        await here.write(HEADER)
        with pytest.raises(ConnectionError, match="no message of ours: KeyError\\('Opening'"):
            await there.read()


@pytest.mark.parametrize("value", [object(), {1: "a"}, {1}, np.zeros(2, np.float32), 1j])
def test_what_is_no_plain_value_is_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match=f"a {type(value).__name__} cannot go"):
        pack([value])


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{}", b'{"sizes": []}', b'{"sizes": 3}', b'{"message": {"bytes": 0}, "sizes": []}',
     b'{"message": {"kind": "Moved", "fields": {}}, "sizes": []}', b"{", b"\xff"],
)  # fmt: skip
async def test_what_is_no_message_is_a_lost_connection(header: bytes) -> None:
    async with joined() as (_, _, here, there):
        await here._pipe.write([struct.pack("<I", len(header)) + header])
        with pytest.raises(ConnectionError):
            await there.read()


@pytest.mark.parametrize("size", [MAX_HEADER + 1, 2**32 - 1])
async def test_a_header_is_bounded(size: int) -> None:
    async with joined() as (_, _, here, there):
        await here._pipe.write([struct.pack("<I", size) + b"{}"])
        with pytest.raises(ConnectionError, match=f"{size} bytes"):
            await there.read()


# --- commits


HEADER = Header(
    Opening("s", "red ☃", 48, 32, 16.5, "live", seed=3, mask=True), "webp", Ready("m", 12, 9, 0)
)
WHOLE = SplitState(b"\x00state", (PART.name, PART.name), (PART,))
PROGRESS = Progress(21, 20, "newest", "applied", WHOLE, dropped=((24, 3), (40, 1)))
ENTRIES = [Entry(9, '{"type":"chunk"}'), Entry(9, b"\x00image"), Entry(10, "ü"), Entry(10, b"")]


@asynccontextmanager
async def hub(store: SessionStore) -> AsyncIterator[Address]:
    listener = Listener(HOST, COMMIT_KINDS)
    address = await listener.answer(store.commit)
    try:
        yield address
    finally:
        listener.close()


def asker(*places: Address) -> Asker:
    """Of a process that is found at each of `places` in turn, and then where it was last."""
    left = list(places)

    async def find() -> Address:
        return left.pop(0) if len(left) > 1 else left[0]

    return Asker(find, COMMIT_KINDS)


@pytest.mark.parametrize(
    "progress",
    [
        PROGRESS,
        replace(PROGRESS, state=None, finished=True),
        replace(PROGRESS, state=SplitState(b"")),
    ],
)
async def test_a_commit_over_the_port_is_a_commit(progress: Progress) -> None:
    here, there = SessionStore(), SessionStore()
    async with hub(there) as address:
        client = asker(address)
        # Of a session that the store does not know (it was started anew): made again, whole.
        assert await client.ask(Commit("token", 4, HEADER, progress, ENTRIES))
        assert await here.commit(Commit("token", 4, HEADER, progress, ENTRIES))
        assert not await client.ask(Commit("token", 3, HEADER, PROGRESS, ENTRIES))
        assert await client.ask(Commit("token", 4, HEADER, progress, []))
    mine = await here.claim("token", progress.edited)
    theirs = await there.claim("token", progress.edited)
    assert theirs.header == mine.header == HEADER
    assert theirs.progress == mine.progress == progress
    assert theirs.epoch == mine.epoch == 5
    assert [tuple(vars(e).values()) for e in there._records["token"].tail] == [
        tuple(vars(e).values()) for e in ENTRIES
    ]


async def test_a_commit_holds_the_longest_prompts_of_any_letters() -> None:
    store, prompt = SessionStore(), "\U0001f600" * Limits().max_prompt
    header = replace(HEADER, opening=replace(HEADER.opening, prompt=prompt))
    progress = replace(PROGRESS, prompt=prompt, applied_prompt=prompt)
    entries = [Entry(9, to_json(PromptApplied(prompt, 9)))]
    async with hub(store) as address:
        client = asker(address)
        assert await client.ask(Commit("token", 0, header, progress, entries))
    assert (await store.claim("token", 20)).progress == progress


async def test_nobody_without_the_secret_writes_a_record() -> None:
    store = SessionStore()
    async with hub(store) as right:
        for wrong in other(right.secret):
            with pytest.raises(OSError):  # noqa: PT011 - of whatever kind
                await asker(replace(right, secret=wrong)).ask(
                    Commit("token", 0, HEADER, PROGRESS, ENTRIES)
                )
        assert len(store) == 0


async def test_a_hub_that_was_started_again_is_found_again() -> None:
    stores = [SessionStore(), SessionStore()]
    async with hub(stores[0]) as first, hub(stores[1]) as second:
        client = asker(first, second)
        assert await client.ask(Commit("token", 0, HEADER, PROGRESS, ENTRIES))
        assert await client.ask(Commit("token", 0, HEADER, PROGRESS, []))
        assert [len(store) for store in stores] == [1, 0]
        assert client._link is not None
        client._link.close()
        assert await client.ask(Commit("token", 0, HEADER, PROGRESS, ENTRIES))
    assert [len(store) for store in stores] == [1, 1]


async def test_a_hub_that_is_gone_is_an_os_error() -> None:
    async with hub(SessionStore()) as address:
        pass
    with pytest.raises(OSError):  # noqa: PT011 - of whatever kind
        await asker(address).ask(Commit("token", 0, HEADER, PROGRESS, ENTRIES))


async def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next() -> None:
    store = SessionStore()
    async with hub(store) as address:
        client = asker(address)
        assert await client.ask(Commit("token", 1, HEADER, PROGRESS, []))
        for steps in range(12):
            given_up = asyncio.create_task(client.ask(Commit("token", 0, HEADER, PROGRESS, [])))
            for _ in range(steps):
                await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            assert await client.ask(Commit("token", 1, HEADER, PROGRESS, []))


async def test_commits_of_many_sessions_do_not_mix() -> None:
    store = SessionStore()
    commits = [
        Commit(str(n % 10), 1 - n // 10, HEADER, replace(PROGRESS, edited=n), []) for n in range(20)
    ]
    async with hub(store) as address:
        client = asker(address)
        assert await client.ask(Commit("before", 0, HEADER, PROGRESS, []))  # all over one link
        answers = await asyncio.gather(*(client.ask(commit) for commit in commits))
    assert answers == [True] * 10 + [False] * 10
    assert [(await store.claim(str(n), n)).progress.edited for n in range(10)] == list(range(10))


async def test_an_end_of_which_the_other_is_gone_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the hub would hold a descriptor for every front that ever was."""
    closed: list[Link] = []
    close = Link.close
    monkeypatch.setattr(Link, "close", lambda self: (closed.append(self), close(self)))
    async with hub(SessionStore()) as address:
        client = asker(address)
        assert await client.ask(Commit("token", 0, HEADER, PROGRESS, []))
        mine = client._link
        assert mine is not None
        mine.close()
        async with asyncio.timeout(20):
            while len(closed) < 2:
                await asyncio.sleep(0.005)
        assert [end is mine for end in closed] == [True, False]
