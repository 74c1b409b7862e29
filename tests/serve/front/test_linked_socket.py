"""Messages that go past the ingress, over a link of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from serve.front import socket as front_socket
from serve.front.socket import (
    EXTENSION,
    GRANT,
    LINK,
    MAX_UNWRITTEN,
    READ_AHEAD,
    Disconnected,
    Socket,
)
from serve.ingress.backpressure import FlowControl
from serve.run import free_port
from serve.wire.link import Address, Link, Listener
from tests.serve.front.wires import Wire, settle, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener("127.0.0.1", ())
    yield made
    assert made._expected == {}
    made.close()


async def test_messages_go_past_the_ingress_in_order_to_the_goodbye(listener: Listener) -> None:
    got: list[Any] = []

    async def application(socket: Socket) -> None:
        await socket.accept("liveedit.v1")
        got.append(await socket.receive())
        await socket.expect(1000)
        for n in range(40):
            await socket.send(f"said {n}" if n % 3 else bytes([n]) * 50_000)
            got.append(await socket.receive())
        got.append(await socket.receive())
        await socket.close(4000)

    wire = Wire(application, listener)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    wire.incoming.put_nowait({"type": "websocket.receive", "text": "open"})
    for n in range(40):  # ASGI leaves open whether the other key is there
        other = {"text": None} if n % 2 else {}
        wire.incoming.put_nowait({"type": "websocket.receive", "bytes": bytes([n]), **other})
    wire.incoming.put_nowait({"type": "websocket.receive", "text": "ä" * 300_000})
    async with asyncio.timeout(20):
        await wire.run()
    assert got == ["open", *(bytes([n]) for n in range(40)), "ä" * 300_000]
    said = [message.get("text") or message.get("bytes") for message in wire.sent[1:-1]]
    assert said == [f"said {n}" if n % 3 else bytes([n]) * 50_000 for n in range(40)]
    assert wire.sent[-1] == {"type": "websocket.close", "code": 4000}
    assert sorted(wire.through_ingress) == sorted(
        ["websocket.connect", "websocket.accept", "websocket.receive", LINK, "websocket.close"]
    )


async def test_a_socket_is_read_no_further_over_a_link_either(listener: Listener) -> None:
    gate, got = asyncio.Event(), list[Any]()

    async def application(socket: Socket) -> None:
        await socket.accept(None)
        await socket.receive()
        await socket.expect(1000)
        await gate.wait()
        with contextlib.suppress(Disconnected):
            while True:
                got.append(await socket.receive())

    wire = Wire(application, listener)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    for n in range(100):
        wire.incoming.put_nowait({"type": "websocket.receive", "bytes": bytes([n])})
    wire.incoming.put_nowait({"type": "websocket.disconnect", "code": 1001})
    running = asyncio.create_task(wire.run())
    await until(lambda: wire.read == 1 + READ_AHEAD)
    await settle()
    assert wire.read == 1 + READ_AHEAD == 17
    gate.set()
    async with asyncio.timeout(20):
        await running
    assert got == [bytes([n]) for n in range(1, 100)]
    assert "websocket.disconnect" in wire.through_ingress  # Ray counts these


async def test_what_was_said_last_reaches_who_reads_late(listener: Listener) -> None:
    """Half a mebibyte is said to a client that takes nothing; then the application is over."""
    handed = 0

    async def application(socket: Socket) -> None:
        nonlocal handed
        await socket.accept(None)
        await socket.receive()
        await socket.expect(1000)
        wire.writable.clear()
        while handed < 8:
            await asyncio.wait_for(socket.send(bytes(MAX_UNWRITTEN // 4)), 5)
            handed += 1
            if handed == 5:
                break
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(socket.send(b"too much"), 0.05)
        await socket.close(1000)

    wire = Wire(application, listener)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    wire.incoming.put_nowait({"type": "websocket.receive", "text": "open"})
    running = asyncio.create_task(wire.run())
    await until(lambda: wire.through_ingress[-1:] == ["websocket.close"])
    assert len(wire.sent) == 1
    wire.writable.set()
    async with asyncio.timeout(20):
        await running
    assert [len(m.get("bytes", b"")) for m in wire.sent[1:]] == [MAX_UNWRITTEN // 4] * 5 + [0]
    assert wire.sent[-1]["type"] == "websocket.close"


@pytest.mark.parametrize("leaves", [OSError, RuntimeError])  # uvicorn's, by how it left
async def test_a_client_that_left_is_heard_of_by_who_reads_no_further(
    listener: Listener, leaves: type[Exception]
) -> None:
    """Its goodbye is not read, but nothing can be sent to it either."""
    ended: list[int] = []

    async def application(socket: Socket) -> None:
        await socket.accept(None)
        await socket.receive()
        await socket.expect(1000)
        wire.left = leaves("nobody is there")
        try:
            for _ in range(6):
                await socket.send(bytes(MAX_UNWRITTEN // 4))
        except Disconnected as error:
            ended.append(error.code)
        with pytest.raises(Disconnected) as raised:
            await socket.receive()
        ended.append(raised.value.code)

    wire = Wire(application, listener)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    wire.incoming.put_nowait({"type": "websocket.receive", "text": "open"})
    async with asyncio.timeout(20):
        await wire.run()
    assert ended == [1006, 1006]


async def test_an_application_that_dies_has_said_what_it_said(listener: Listener) -> None:
    async def application(socket: Socket) -> None:
        await socket.accept(None)
        await socket.receive()
        await socket.expect(1000)
        await socket.send(b"last words")
        await until(lambda: len(wire.sent) == 2)
        raise RuntimeError("dead")

    wire = Wire(application, listener)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    wire.incoming.put_nowait({"type": "websocket.receive", "text": "open"})
    with pytest.raises(RuntimeError, match="dead"):
        async with asyncio.timeout(20):
            await wire.run()
    assert wire.sent[-1] == {"type": "websocket.send", "bytes": b"last words"}


async def test_who_ends_without_a_goodbye_is_heard_to_the_end(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither end holds a descriptor for it any longer."""
    closed: list[Link] = []
    close = Link.close
    monkeypatch.setattr(Link, "close", lambda self: (closed.append(self), close(self)))

    async def application(socket: Socket) -> None:
        await socket.accept(None)
        await socket.receive()
        await socket.expect(1000)
        await socket.send(b"last words")

    wire = Wire(application, listener)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    wire.incoming.put_nowait({"type": "websocket.receive", "text": "open"})
    async with asyncio.timeout(20):
        await wire.run()
    assert wire.sent[-1] == {"type": "websocket.send", "bytes": b"last words"}
    assert len(set(closed)) == 2


async def test_an_application_that_cannot_be_connected_to_may_say_goodbye() -> None:
    said: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": LINK, "host": "127.0.0.1", "port": free_port(), "secret": bytes(32)})
        await send({"type": "websocket.close", "code": 1011})

    async def send(message: Any) -> None:
        said.append(message)

    async with asyncio.timeout(20):
        client = asyncio.Event().wait  # says nothing
        await FlowControl(application)({"type": "websocket"}, client, send)  # type: ignore[arg-type]
    assert said == [{"type": "websocket.close", "code": 1011}]


async def test_an_ingress_that_does_not_connect_costs_the_client_its_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, listener: Listener
) -> None:
    monkeypatch.setattr(front_socket, "HELLO_S", 0.05)
    said, sent = asyncio.Queue[Any](), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    for gone in (False, True):
        socket = Socket({"extensions": {EXTENSION: {LINK: True}}}, said.get, send, listener)
        said.put_nowait({"type": "websocket.connect"})
        await socket.accept(None)
        if gone:
            said.put_nowait({"type": "websocket.disconnect", "code": 1006})
        with pytest.raises(Disconnected):
            await socket.expect(1000)
        assert [message["type"] for message in sent][-1] == LINK
        assert ("did not connect to 127.0.0.1" in caplog.text) is not gone
        caplog.clear()
        socket.end()


async def test_an_ingress_of_before_is_asked_for_no_link(listener: Listener) -> None:
    said, sent = asyncio.Queue[Any](), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message["type"])

    socket = Socket({"extensions": {EXTENSION: {}}}, said.get, send, listener)
    said.put_nowait({"type": "websocket.connect"})
    await socket.accept(None)
    await socket.expect(1000)
    said.put_nowait({"type": "websocket.receive", "text": "more"})
    assert await socket.receive() == "more"
    assert LINK not in sent
    assert GRANT in sent
    socket.end()


async def test_an_ingress_that_goes_is_a_client_that_goes(listener: Listener) -> None:
    ended: list[Any] = []

    async def application(socket: Socket) -> None:
        await socket.accept(None)
        await socket.receive()
        await socket.expect(1000)
        ready.set()
        try:
            await socket.receive()
        except Disconnected as error:
            ended.append(error.code)
            raise

    ready = asyncio.Event()
    said: asyncio.Queue[Any] = asyncio.Queue()
    addresses: list[Any] = []

    async def send(message: Any) -> None:
        if message["type"] == LINK:
            addresses.append(message)

    socket = Socket({"extensions": {EXTENSION: {LINK: True}}}, said.get, send, listener)
    for message in ({"type": "websocket.connect"}, {"type": "websocket.receive", "text": "open"}):
        said.put_nowait(message)
    running = asyncio.create_task(application(socket))
    await until(lambda: bool(addresses))
    address = {key: addresses[0][key] for key in ("host", "port", "secret")}
    link = await Link.connect(Address(**address), ())
    await ready.wait()
    link.close()
    with pytest.raises(Disconnected):
        await asyncio.wait_for(running, 20)
    assert ended == [1006]
    with pytest.raises(Disconnected):
        await socket.send("more")
    socket.end()
