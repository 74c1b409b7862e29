"""When the client of a server that does as it is told comes back, where it goes on, and when it
gives up."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest

from serve.client import ConnectError
from serve.client import stream as client_stream
from tests.serve.client.scripted import PICTURE, Peer, collect, opening, send, server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("hurry")]


@pytest.mark.parametrize("how", ["cut", "draining", "internal", "at_capacity"])
async def test_it_comes_back_and_goes_on_where_the_server_stands(how: str) -> None:
    async def first(peer: Peer) -> None:
        await peer.greet()
        heard = [await peer.hear() for _ in range(4)]
        assert [item for item in heard if isinstance(item, int)] == [0, 1, 2]
        assert {"type": "prompt", "prompt": "blue"} in heard
        await peer.edited(0)
        await (peer.socket.close(1001) if how == "cut" else peer.error(how))

    async def second(peer: Peer) -> None:
        assert peer.open["resume"] == "token-0"
        assert peer.open["received"] == 1
        assert peer.open["prompt"] == "red"  # as it first opened; the newest follows
        await peer.greet(next_frame=2)
        assert await peer.hear() == {"type": "prompt", "prompt": "blue"}
        assert await peer.hear() == 2
        await peer.edited(1, 2)
        await peer.finish(3)

    async with server(first, second) as (url, peers), opening(url) as stream:
        await send(stream, 3)
        stream.set_prompt("blue")
        got = []
        async for frame in stream:
            got.append(frame.index)
            np.testing.assert_array_equal(frame.pixels, PICTURE + np.uint8(frame.index))
            assert frame.time_us == 5
            if frame.index == 2:
                stream.finish()
        assert got == [0, 1, 2]
        assert (stream.reconnects, len(peers)) == (1, 2)
        assert stream._resume == "token-1"
        assert not stream._kept


async def test_what_is_said_goes_out_at_once() -> None:
    """Not with what is said next: a prompt between two frames of a slow source, say."""
    heard = asyncio.Queue[object]()

    async def note(peer: Peer) -> None:
        await peer.greet()
        for _ in range(3):
            heard.put_nowait(await peer.hear())
        await peer.say(type="closed", frames=0, reason="close")

    async with server(note) as (url, _), opening(url) as stream, asyncio.timeout(20):
        await send(stream, 1)
        assert await heard.get() == 0
        stream.set_prompt("blue")
        assert await heard.get() == {"type": "prompt", "prompt": "blue"}
        stream.finish()
        assert await heard.get() == {"type": "close"}
        assert await collect(stream) == []


@pytest.mark.parametrize("before", [0, 2])
async def test_a_server_that_brings_nothing_more_is_given_up(before: int) -> None:
    async def nothing(peer: Peer) -> None:
        await peer.greet()
        if peer.number < before:
            await peer.edited(peer.number)
        elif peer.number > before + 5:  # it should have been given up
            await peer.say(type="closed", frames=before, reason="close")
        await peer.socket.close(1011)

    async with server(nothing) as (url, peers), opening(url) as stream, asyncio.timeout(60):
        with pytest.raises(ConnectError, match="connection is lost"):
            await collect(stream)
        assert len(peers) == before + 5


@pytest.mark.parametrize(("first_s", "resume_s"), [(0.0, 600.0), (600.0, 0.0)])
async def test_a_session_is_looked_for_as_long_as_a_server_keeps_it(
    first_s: float, resume_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as long as a server that has never answered."""
    monkeypatch.setattr(client_stream, "RESUME_S", resume_s)

    async def take(peer: Peer) -> None:
        await peer.greet()
        await peer.socket.close(1011)

    async def away(peer: Peer) -> None:
        await peer.socket.close(1011)

    async def back(peer: Peer) -> None:
        await peer.greet()
        await peer.finish(0)

    async with server(take, away, away, back) as (url, peers), opening(url) as stream:
        monkeypatch.setattr(client_stream, "FIRST_S", first_s)
        stream.finish()
        if resume_s:
            assert await collect(stream) == []
            assert len(peers) == 4
        else:
            with pytest.raises(ConnectError, match="connection is lost"):
                await collect(stream)


async def test_each_loss_begins_with_the_shortest_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which doubles while the server is away, up to the longest."""
    pauses: list[float] = []

    class Noted:
        def __rmul__(self, pause: float) -> float:
            pauses.append(pause)
            return 0.0

    monkeypatch.setattr(client_stream, "random", SimpleNamespace(uniform=lambda *_: Noted()))

    async def take(peer: Peer) -> None:
        await peer.greet()
        await peer.edited(peer.number)
        await peer.socket.close(1011)

    async def away(peer: Peer) -> None:
        await peer.socket.close(1011)

    async def back(peer: Peer) -> None:
        await peer.greet()
        await peer.finish(2)

    scripts = (take, *[away] * 5, take, away, back)
    async with server(*scripts) as (url, peers), opening(url) as stream:
        stream.finish()
        assert await collect(stream) == [0, 6]
        assert len(peers) == len(scripts)
    assert pauses == pytest.approx([0.001, 0.002, 0.004, 0.008, 0.01, 0.01, 0.001, 0.002])


async def test_a_connection_that_lasted_long_is_looked_for_from_its_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what its client has are the frames that came, not those that they were made of."""
    now = 100.0
    clock = SimpleNamespace(monotonic=lambda: now, time_ns=time.time_ns)
    monkeypatch.setattr(client_stream, "time", clock)

    async def first(peer: Peer) -> None:
        nonlocal now
        await peer.greet()
        assert [await peer.hear() for _ in range(6)] == list(range(6))
        await peer.say(type="dropped", first_frame=1, frames=3)
        await peer.edited(0, 4)
        now += 10 * client_stream.RESUME_S
        await peer.socket.close(1011)

    async def away(peer: Peer) -> None:
        await peer.socket.close(1011)

    async def back(peer: Peer) -> None:
        assert peer.open["received"] == 2
        await peer.greet(next_frame=5)
        assert await peer.hear() == 5
        await peer.edited(5)
        await peer.finish(3)

    async with server(first, away, back) as (url, peers), opening(url, mode="live") as stream:
        await send(stream, 6)
        stream.finish()
        assert await collect(stream) == [0, 4, 5]
        assert [peer.open.get("received") for peer in peers] == [None, 2, 2]


async def test_a_prompt_that_was_not_sent_is_sent_once() -> None:
    back = asyncio.Event()

    async def first(peer: Peer) -> None:
        await peer.greet()
        await peer.socket.close(1011)

    async def second(peer: Peer) -> None:
        await back.wait()
        await peer.greet()
        assert [await peer.hear() for _ in range(2)] == [
            {"type": "prompt", "prompt": "blue"}, {"type": "close"}
        ]  # fmt: skip
        await peer.say(type="closed", frames=0, reason="close")

    async with server(first, second) as (url, peers), opening(url) as stream:
        while len(peers) < 2:
            await asyncio.sleep(0.005)
        for prompt in ("green", "blue"):
            stream.set_prompt(prompt)
        stream.finish()
        back.set()
        assert await collect(stream) == []


async def test_who_waits_hears_its_place_also_when_it_comes_back() -> None:
    async def waits(peer: Peer) -> None:
        for place in (2, 1):
            await peer.say(type="queued", place=place, expected_s=3.0)
        await peer.greet()
        if peer.number:
            await peer.finish(0)
        await peer.socket.close(1011)

    places: list[int] = []
    async with server(waits) as (url, _):
        asked = opening(url, on_queue=lambda message: places.append(message.place))
        async with asked as stream:
            stream.finish()
            assert await collect(stream) == []
    assert places == [2, 1, 2, 1]


async def test_a_server_that_always_brings_something_is_not() -> None:
    async def one_more(peer: Peer) -> None:
        await peer.greet()
        await peer.edited(peer.number)
        if peer.number == 10:
            await peer.finish(11)
        else:
            await peer.socket.close(1011)

    async with server(one_more) as (url, _), opening(url) as stream:
        stream.finish()
        assert await collect(stream) == list(range(11))
        assert stream.received == 11


async def test_live_leaves_out_what_comes_while_it_is_not_connected() -> None:
    back = asyncio.Event()

    async def first(peer: Peer) -> None:
        await peer.greet()
        await peer.hear()
        await peer.socket.close(1011)

    async def second(peer: Peer) -> None:
        await back.wait()
        await peer.greet(next_frame=1)
        assert await peer.hear() == 1
        await peer.edited(1)
        await peer.finish(1)

    async with server(first, second) as (url, peers), opening(url, mode="live") as stream:
        assert await stream.send(PICTURE) == 0
        while len(peers) < 2:
            await asyncio.sleep(0.01)
        left_out = [await stream.send(PICTURE) for _ in range(2)]
        back.set()
        assert left_out == [None, None]
        while not stream._connected.is_set():
            await asyncio.sleep(0.01)
        assert await stream.send(PICTURE + np.uint8(1)) == 1
        stream.finish()
        assert await collect(stream) == [1]
