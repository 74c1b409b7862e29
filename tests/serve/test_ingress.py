"""What strangers may cost the process that owns the sockets, before anything of ours is asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import uvicorn
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from serve.ingress import UVICORN, http, unread, websocket
from serve.ingress.unread import Unread
from serve.limits import Limits
from serve.run import free_port

pytestmark = pytest.mark.anyio

GET = b"GET /x HTTP/1.1\r\nHost: x\r\n"
SLOW = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = (
    GET + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
LARGE = 2**25  # bytes
PING = b"\x89\xfd" + bytes(4) + b"p" * 125


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers every request, /slow in half a second, /large with what no socket holds, /back with
    its body, and says every message back."""
    large = scope["path"] == "/large"
    if scope["path"] == "/back":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            piece = message.get("body", b"")
            await send({"type": "http.response.body", "body": piece, "more_body": more})
        return
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-length", b"%d" % (LARGE if large else 2))]})  # fmt: skip
        if scope["path"] == "/slow":
            await send({"type": "http.response.body", "body": b"o", "more_body": True})
            await asyncio.sleep(0.5)
            await send({"type": "http.response.body", "body": b"k"})
        else:
            body = bytes(LARGE) if large else b"ok"
            await send({"type": "http.response.body", "body": body})
        return
    await receive()
    await send({"type": "websocket.accept"})
    if large:
        await send({"type": "websocket.send", "bytes": bytes(LARGE)})
        return
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": str(len(message["text"]))})


@asynccontextmanager
async def ingress() -> AsyncIterator[uvicorn.Server]:
    config = uvicorn.Config(application, port=free_port(), lifespan="off", **UVICORN)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server
    finally:  # at once: uvicorn's own end looks ten times a second
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


class Raw:
    """A connection whose bytes the test writes."""

    def __init__(self, server: uvicorn.Server) -> None:
        self.port = server.config.port

    async def __aenter__(self) -> Raw:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def upgrade(self) -> None:
        self.writer.write(UPGRADE + b"\r\n")
        await self.reader.readuntil(b"\r\n\r\n")

    async def flood(self, piece: bytes, most: int) -> int:
        """Bytes that were taken until the connection was over, at most `most`."""
        taken = 0
        try:
            while taken < most and not self.writer.transport.is_closing():
                self.writer.write(piece)
                taken += len(piece)
                await asyncio.wait_for(self.writer.drain(), 20)
        except ConnectionError:
            pass
        return taken

    async def answer(self) -> bytes:
        """All that comes until the server closes."""
        try:
            return await asyncio.wait_for(self.reader.read(), 20)
        except ConnectionError:
            return b""


@pytest.mark.parametrize("line", [b"X-Long: " + b"a" * 2**16, b"x: y\r\n" * 11_000])
async def test_a_requests_head_is_bounded(line: bytes) -> None:
    async with ingress() as server, Raw(server) as raw:
        raw.writer.write(GET + line)
        answer = await raw.answer()
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"at most 65536 bytes" in answer
    async with ingress() as server, Raw(server) as raw:
        raw.writer.write(GET + line[:60_000].rpartition(b"\r\n")[0] + b"\r\n\r\n")
        assert (await raw.reader.readline()).startswith(b"HTTP/1.1 200")


async def test_a_requests_head_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.3)
    async with ingress() as server, Raw(server) as silent, Raw(server) as half, Raw(server) as kept:
        half.writer.write(GET)
        kept.writer.write(GET + b"\r\n")
        assert (await kept.reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        kept.writer.write(GET)  # another request on it, that stops, too
        for raw in (silent, half, kept):
            assert await raw.answer() == b""
        async with Raw(server) as slow:  # whole in time, its body is the application's matter
            slow.writer.write(GET + b"Content-Length: 5\r\n\r\n")
            assert (await slow.reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.6)
            slow.writer.write(b"body." + GET + b"\r\n")
            assert (await slow.reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")


async def test_a_body_comes_whole_and_goes_on_when_its_answer_is_read() -> None:
    body = np.random.default_rng(0).bytes(2**23)  # more than both sockets hold
    head = POST.replace(b"/x", b"/back").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    for size in (100, len(body)):
        async with ingress() as server, Raw(server) as raw:
            raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
            raw.writer.write(head % size + body[:size])
            async with asyncio.timeout(20):
                while size > 100 and not any(
                    connection.flow.write_paused for connection in server.server_state.connections
                ):
                    await asyncio.sleep(0.005)
            raw.reader._transport.resume_reading()  # type: ignore[attr-defined]
            told, _, answer = (await raw.answer()).partition(b"\r\n\r\n")
            assert told.startswith(b"HTTP/1.1 200")
            assert unchunked(answer) == body[:size]


def unchunked(said: bytes) -> bytes:
    """A body without the sizes of its pieces."""
    out, place = [], 0
    while size := int(said[place : (end := said.index(b"\r\n", place))], 16):
        out.append(said[end + 2 : end + 2 + size])
        place = end + 2 + size + 2
    return b"".join(out)


async def test_what_nobody_asked_for_of_a_body_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_UNASKED", 2**20)
    async with ingress() as server, Raw(server) as short, Raw(server) as endless:
        short.writer.write(POST % 2**20 + bytes(2**20) + GET + b"\r\n")
        for _ in range(2):
            await asyncio.wait_for(short.reader.readuntil(b"ok"), 20)
        endless.writer.write(POST % 2**40)
        assert await endless.flood(bytes(2**16), 2**30) < 2**25  # what sockets hold among it


async def test_what_nobody_asked_for_is_counted_by_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kept connection may carry many uploads that are refused."""
    monkeypatch.setattr(http, "MAX_UNASKED", 2**12)
    async with ingress() as server, Raw(server) as raw:
        for _ in range(3):
            raw.writer.write(POST % 2**12)
            await asyncio.wait_for(raw.reader.readuntil(b"ok"), 20)
            raw.writer.write(bytes(2**12))


async def test_a_refused_upload_reads_the_refusal_when_it_is_written() -> None:
    assert Limits().max_upload <= http.MAX_UNASKED
    async with ingress() as server, Raw(server) as raw:
        raw.writer.write(POST % 2**25 + bytes(2**25))
        await asyncio.wait_for(raw.writer.drain(), 20)
        raw.writer.write(GET + b"\r\n")
        for _ in range(2):
            await asyncio.wait_for(raw.reader.readuntil(b"ok"), 20)


async def test_what_nobody_asked_for_of_a_body_comes_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "UNASKED_S", 0.2)
    async with ingress() as server, Raw(server) as stuck, Raw(server) as whole:
        for raw in (stuck, whole):
            raw.writer.write(POST % 100)
            await raw.reader.readuntil(b"ok")
            raw.writer.write(b"1")
        await asyncio.sleep(0.05)
        whole.writer.write(bytes(99))
        await asyncio.sleep(0.3)
        whole.writer.write(GET + b"\r\n")
        assert (await whole.reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        assert await stuck.answer() == b""


@pytest.mark.parametrize("endless", [b"0\r\nX: ", b"5;"], ids=["trailer", "chunk extension"])
async def test_what_is_no_body_within_one_has_an_end(endless: bytes) -> None:
    async with ingress() as server, Raw(server) as short, Raw(server) as long:
        short.writer.write(CHUNKED + b"5;a=b\r\nbody.\r\n0\r\nX: y\r\n\r\n" + GET + b"\r\n")
        for _ in range(2):
            await asyncio.wait_for(short.reader.readuntil(b"ok"), 20)
        long.writer.write(CHUNKED + endless)
        await long.reader.readuntil(b"ok")
        assert await long.flood(b"a" * 2**16, 2**26) < 2**25  # what sockets hold among it


async def test_what_comes_while_an_answer_runs_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.3)
    async with ingress() as server, Raw(server) as early, Raw(server) as large:
        for raw in (early, large):
            raw.writer.write(SLOW)
            await raw.reader.readuntil(b"\r\n\r\no")
        early.writer.write(b"\r\n" + GET)
        large.writer.write(GET + b"X-Long: " + b"a" * 2**17)
        assert b"400" not in await large.answer()  # it would be a part of the answer
        assert await asyncio.wait_for(early.reader.readuntil(b"k"), 20) == b"k"
        early.writer.write(b"X")
        assert await early.answer() == b""


async def test_a_body_and_the_next_request_are_no_head() -> None:
    """What is read at once may be the end of the one and the beginning of the other."""
    async with ingress() as server, Raw(server) as raw:
        for size in (100, 70_000, 200_000, 1_000_000):
            raw.writer.write(POST % size)
            await raw.reader.readuntil(b"ok")  # it is answered at once
            for body in (bytes(size - 1), b"\0" + GET, b"\r\n"):
                raw.writer.write(body)
                await raw.writer.drain()
            assert (await raw.reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        raw.writer.write((GET + b"\r\n") * 5000 + GET)
        for _ in range(5000):
            assert (await raw.reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"Content-Length: 5\r\n\r\n", b"HTTP/1.1 400"),
        (b"X: \x01\r\n\r\n", b"HTTP/1.1 400"),
    ],
    ids=["body", "control character"],
)
async def test_an_upgrade_that_is_none_is_answered_and_ends(rest: bytes, status: bytes) -> None:
    async with ingress() as server, Raw(server) as raw:
        raw.writer.write(UPGRADE + rest)
        assert (await raw.answer()).startswith(status)


@pytest.mark.parametrize(
    "rest",
    [
        b"x: y\r\n" * 9000 + b"\r\n",
        b"Cookie: " + b"a" * 60_000 + b"\r\n\r\n",
        b"x: " + b"a" * http.MAX_HEAD,
    ],
    ids=["many headers", "long header", "too long"],
)
async def test_a_head_is_bounded_alike_for_pages_and_streams(rest: bytes) -> None:
    async with ingress() as server, Raw(server) as page, Raw(server) as stream:
        statuses = []
        for raw, request in ((page, GET), (stream, UPGRADE)):
            raw.writer.write(request + rest)
            statuses.append((await raw.reader.readline())[9:12])
        assert statuses == ([b"200", b"101"] if rest.endswith(b"\n") else [b"400", b"400"])


async def test_pings_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "CONTROL_S", 60.0)
    async with ingress() as server, Raw(server) as raw:
        await raw.upgrade()
        raw.writer.write(PING * websocket.MAX_CONTROL)
        await raw.reader.readexactly(websocket.MAX_CONTROL * 127)
        raw.writer.write(b"\x81\x81" + bytes(4) + b"a")
        assert await raw.reader.readexactly(3) == b"\x81\x011"  # so many are not too many
        raw.writer.write(PING)
        last = await raw.answer()
        assert struct.unpack(">H", last[2:4]) == (websocket.VIOLATION,)
        assert b"pings a second" in last
    async with ingress() as server, Raw(server) as raw:
        await raw.upgrade()
        assert await raw.flood(b"\x8a\x80" + bytes(4), 20_000) < 20_000  # pongs to no ping


async def test_pings_are_counted_anew_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends one now and then for hours is no flood."""
    monkeypatch.setattr(websocket, "CONTROL_S", -1.0)  # it is over at once
    async with ingress() as server, Raw(server) as raw:
        await raw.upgrade()
        raw.writer.write(PING * (2 * websocket.MAX_CONTROL))
        await raw.reader.readexactly(2 * websocket.MAX_CONTROL * 127)


async def test_who_does_not_read_gets_no_pongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "MAX_CONTROL", 10**9)
    async with ingress() as server, Raw(server) as raw:
        await raw.upgrade()
        raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
        (connection,) = server.server_state.connections
        assert await raw.flood(PING * 500, 12_000_000) >= 12_000_000
        assert connection.transport.get_write_buffer_size() < 2**18


async def test_a_message_comes_in_few_pieces() -> None:
    async with ingress() as server:
        url = f"ws://127.0.0.1:{server.config.port}/x"
        for pieces in (websocket.MAX_FRAGMENTS, websocket.MAX_FRAGMENTS + 1):
            async with connect(url, compression=None) as client:
                try:
                    await client.send(["a"] * (pieces - 1))  # and an empty one ends it
                    assert json.loads(await asyncio.wait_for(client.recv(), 20)) == pieces - 1
                except ConnectionClosed:
                    assert pieces > websocket.MAX_FRAGMENTS
                    assert client.close_code == websocket.VIOLATION
                else:
                    assert pieces <= websocket.MAX_FRAGMENTS


@pytest.mark.parametrize(
    ("request_", "times"), [(GET, 1), (GET, 40), (UPGRADE, 1)], ids=["page", "many", "stream"]
)
async def test_who_reads_nothing_of_an_answer_keeps_no_connection(
    monkeypatch: pytest.MonkeyPatch, request_: bytes, times: int
) -> None:
    """Of its last piece, or of one of many that it asked for at once."""
    monkeypatch.setattr(unread, "UNREAD_S", 0.05)
    async with ingress() as server, Raw(server) as raw:
        raw.writer.write(times * (request_.replace(b"/x", b"/large") + b"\r\n"))
        with contextlib.suppress(ConnectionError):  # it is let go while this test is held up
            await raw.reader.readline()
        raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            while server.server_state.connections:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("upgrades", [False, True])
async def test_nobody_looks_at_a_connection_that_is_gone(
    upgrades: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer would keep it for ever."""
    looking: list[Unread] = []

    class Noted(Unread):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            looking.append(self)

    for module in (http, websocket):
        monkeypatch.setattr(module, "Unread", Noted)
    async with ingress() as server:
        async with Raw(server) as raw:
            if upgrades:
                await raw.upgrade()
            else:
                raw.writer.write(GET + b"\r\n")
                await raw.reader.readuntil(b"ok")
            assert [each._timer.cancelled() for each in looking] == [True, False][not upgrades :]
        async with asyncio.timeout(20):
            while not all(each._timer.cancelled() for each in looking):
                await asyncio.sleep(0.005)
    assert len(looking) == 1 + upgrades
