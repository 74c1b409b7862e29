"""The client against a server that does as it is told: what it says, and when it comes back."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from serve.client import ConnectError, WireError, connect
from serve.client import stream as client_stream
from serve.client.stream import Stream
from serve.wire.protocol import Closed

pytestmark = pytest.mark.anyio

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """One connection at the server's end; `opened` is what the client opened with."""

    def __init__(self, socket: ServerConnection, number: int) -> None:
        self.socket, self.number = socket, number
        self.open: dict[str, Any] = {}

    async def say(self, **message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def greet(self, next_frame: int = 0) -> None:
        await self.say(
            type="opened", session="s", resume=f"token-{self.number}", model="m", chunk_frames=2,
            first_chunk_frames=2, width=6, height=4, next_frame=next_frame,
        )  # fmt: skip

    async def hear(self) -> Any:
        """The index of a frame, or a message without its type's key."""
        data = await asyncio.wait_for(self.socket.recv(), 10)
        if isinstance(data, str):
            return json.loads(data)
        index, flags, _ = struct.unpack_from("<IIQ", data)
        assert flags == 0
        assert data[16:] == (PICTURE + np.uint8(index)).tobytes()
        return index

    async def edited(self, *indices: int) -> None:
        for index in indices:
            image = (PICTURE + np.uint8(index)).tobytes()
            await self.socket.send(struct.pack("<IIQ", index, 0, 5) + image)

    async def error(self, code: str, close: int = 1011) -> None:
        await self.say(type="error", code=code, message="as told", retry_after_s=2.0)
        await self.socket.close(close)

    async def finish(self, frames: int) -> None:
        while await self.hear() != {"type": "close"}:
            pass
        await self.say(type="closed", frames=frames, reason="close")


@asynccontextmanager
async def server(*scripts: Script) -> AsyncIterator[tuple[str, list[Peer]]]:
    """Its address, and its connections; the n-th follows the n-th script, the last again."""
    peers: list[Peer] = []
    failed: list[AssertionError] = []

    async def handle(socket: ServerConnection) -> None:
        peer = Peer(socket, len(peers))
        peers.append(peer)
        try:
            peer.open = json.loads(await socket.recv())
            await scripts[min(peer.number, len(scripts) - 1)](peer)
        except ConnectionClosed:
            pass
        except AssertionError as error:  # of the script: the client is told to end
            failed.append(error)
            await peer.error("bad_request")

    async with serve(
        handle, "127.0.0.1", 0, subprotocols=[Subprotocol("liveedit.v1")], compression=None
    ) as listening:
        try:
            yield f"ws://127.0.0.1:{listening.sockets[0].getsockname()[1]}", peers
        finally:
            if failed:
                raise failed[0]


def opening(url: str, **options: Any) -> Any:
    return connect(url, "red", **{"width": 6, "height": 4, "fps": 8, "format": "rgb24", **options})


async def send(stream: Stream, count: int) -> None:
    for _ in range(count):
        index = stream._next
        await stream.send(PICTURE + np.uint8(index), time_us=index)


async def collect(stream: Stream) -> list[int]:
    return [frame.index async for frame in stream]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_stream, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(client_stream, "LONGEST_PAUSE_S", 0.01)


async def test_it_opens_as_it_was_asked_to() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.finish(0)

    async with server(script) as (url, (peers)):
        async with opening(url, mode="live", seed=0, mask=True, token="secret") as stream:
            assert stream.opened is not None
            assert stream.opened.resume == "token-0"
            stream.finish()
            assert await collect(stream) == []
            assert stream.closed == Closed(0, "close")
        (peer,) = peers
        assert peer.open == {
            "type": "open", "prompt": "red", "width": 6, "height": 4, "fps": 8, "mode": "live",
            "format": "rgb24", "seed": 0, "mask": True,
        }  # fmt: skip
        assert peer.socket.request is not None
        assert peer.socket.request.path == "/v1/stream"
        assert peer.socket.request.headers["Authorization"] == "Bearer secret"


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


@pytest.mark.parametrize("code", ["bad_request", "bad_frame", "unauthorized", "too_slow"])
async def test_other_errors_end_it(code: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.error(code)

    async with server(script) as (url, peers), opening(url) as stream:
        with pytest.raises(WireError, match="as told") as raised:
            await collect(stream)
        assert (raised.value.code, raised.value.retry_after_s) == (code, 2.0)
        with pytest.raises(WireError):
            await send(stream, 1)
        assert len(peers) == 1


@pytest.mark.parametrize(
    ("code", "again"), [("draining", True), ("at_capacity", False), ("internal", False)]
)
async def test_a_first_refusal_is_final_unless_the_server_goes_away(code: str, again: bool) -> None:
    async def refuse(peer: Peer) -> None:
        await peer.error(code, 1013)

    async def take(peer: Peer) -> None:
        assert "resume" not in peer.open
        await peer.greet()
        await peer.finish(0)

    async with server(refuse, take) as (url, _):
        if again:
            async with opening(url) as stream:
                stream.finish()
                assert await collect(stream) == []
                assert stream.reconnects == 0
        else:
            with pytest.raises(WireError) as raised:
                async with opening(url):
                    pass
            assert raised.value.code == code


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


async def test_lossless_waits_while_enough_is_on_its_way() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await go_on.wait()
        await peer.edited(0)
        await peer.finish(1)

    async with server(script) as (url, _), opening(url) as stream:
        sending = asyncio.create_task(send(stream, 100))
        await asyncio.sleep(0.1)
        assert stream._next == 6  # three chunks of two frames
        go_on.set()
        await asyncio.sleep(0.1)
        assert stream._next == 7
        sending.cancel()
        stream.finish()
        assert await collect(stream) == [0]


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


@pytest.mark.parametrize("wrong", [(0, 0), (1, 0)])
async def test_frames_out_of_order_are_the_servers_fault(wrong: tuple[int, int]) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.edited(*wrong)
        await peer.socket.wait_closed()

    async def never(peer: Peer) -> None:
        await peer.error("bad_request")

    async with server(script, never) as (url, _), opening(url) as stream:
        with pytest.raises(WireError):
            await collect(stream)
        assert stream.received == 1


@pytest.mark.parametrize("answer", ["frame", "chunk", "unknown"])
async def test_only_opened_answers_open(answer: str) -> None:
    async def script(peer: Peer) -> None:
        if answer == "frame":
            await peer.edited(0)
        elif answer == "chunk":
            await peer.say(type="dropped", first_frame=0, frames=1)
        else:
            await peer.say(type="weather")
        await peer.socket.wait_closed()

    async with server(script) as (url, _):
        with pytest.raises(WireError) as raised:
            async with opening(url):
                pass
        assert raised.value.code == "bad_request"
