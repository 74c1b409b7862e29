"""Back-pressure through an ingress that buffers without bound, as Ray's does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.front import socket as front_socket
from serve.front.socket import (
    EXTENSION,
    FIRST_SIZE,
    GRANT,
    MAX_UNWRITTEN,
    READ_AHEAD,
    READ_AHEAD_BYTES,
    WRITTEN,
    Disconnected,
    Socket,
)
from tests.serve.front.wires import Wire, settle

pytestmark = pytest.mark.anyio


async def test_the_socket_is_read_no_further_than_the_application_wants() -> None:
    gate = asyncio.Event()
    got: list[Any] = []

    async def application(socket: Socket) -> None:
        await socket.accept("liveedit.v1")
        await gate.wait()
        while True:
            try:
                got.append(await socket.receive())
            except Disconnected:
                return

    wire = Wire(application)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    for n in range(200):
        wire.incoming.put_nowait({"type": "websocket.receive", "bytes": bytes([n])})
    wire.incoming.put_nowait({"type": "websocket.disconnect", "code": 1000})
    running = asyncio.create_task(wire.run())
    await settle()
    assert wire.read <= READ_AHEAD
    gate.set()
    await running
    assert got == [bytes([n]) for n in range(200)]


async def test_texts_are_written_like_frames() -> None:
    """Else who gets many messages and few frames would stand still."""

    async def application(socket: Socket) -> None:
        await socket.accept(None)
        for data in ("x" * MAX_UNWRITTEN, bytes(MAX_UNWRITTEN), "x" * MAX_UNWRITTEN, "x"):
            await socket.send(data)

    wire = Wire(application)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    await asyncio.wait_for(wire.run(), 20)
    assert len(wire.sent) == 5


async def test_the_application_waits_for_a_slow_socket() -> None:
    handed = 0

    async def application(socket: Socket) -> None:
        nonlocal handed
        await socket.accept(None)
        for _ in range(100):
            await socket.send(bytes(MAX_UNWRITTEN // 4))
            handed += 1

    wire = Wire(application)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    running = asyncio.create_task(wire.run())
    await settle()
    wire.writable.clear()
    before = handed
    await settle()
    assert handed - before <= 6
    wire.writable.set()
    await running
    frames = [message for message in wire.sent if message["type"] == "websocket.send"]
    assert len(frames) == handed == 100


async def test_plain_servers_are_left_alone() -> None:
    scope = {"type": "websocket", "subprotocols": []}
    incoming = [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "hello", "bytes": None},
        {"type": "websocket.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    socket = Socket(scope, receive, send)
    assert EXTENSION not in scope
    await socket.accept("liveedit.v1")
    assert await socket.receive() == "hello"
    await socket.send("x")
    with pytest.raises(Disconnected):
        await socket.receive()
    with pytest.raises(Disconnected):
        await socket.send("y")
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send"]


@pytest.mark.parametrize("error", [OSError, RuntimeError])  # uvicorn's, and Ray's
async def test_what_nobody_can_be_given_is_not_sent(error: type[Exception]) -> None:
    """A frame that counts as sent is not sent again to who comes back."""

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        if message["type"] == "websocket.send":
            raise error

    socket = Socket({"type": "websocket"}, receive, send)
    await socket.accept(None)
    for _ in range(2):
        with pytest.raises(Disconnected) as raised:
            await socket.send(b"frame")
        assert raised.value.code == 1006
    assert socket.closed


async def test_nothing_more_is_handed_over_while_the_socket_takes_nothing() -> None:
    """Half a mebibyte may be on its way, and no more however long it takes."""
    handed = 0

    async def application(socket: Socket) -> None:
        nonlocal handed
        await socket.accept(None)
        for _ in range(100):
            await socket.send(bytes(128 * 1024))
            handed += 1

    wire = Wire(application)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    wire.writable.clear()
    running = asyncio.create_task(wire.run())
    for _ in range(5):
        await settle()
        assert handed <= 5
    wire.writable.set()
    await running
    assert handed == 100


@pytest.mark.parametrize(("sent", "code"), [(1001, 1001), (None, 1005)])
async def test_the_clients_close_code_is_known(sent: int | None, code: int) -> None:
    incoming = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": sent}]

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        assert message["type"] == "websocket.accept"

    socket = Socket({"type": "websocket"}, receive, send)
    await socket.accept(None)
    with pytest.raises(Disconnected) as raised:
        await socket.receive()
    assert raised.value.code == code
    assert socket.closed
    await socket.close(1000)  # says nothing to nobody


async def test_so_many_messages_are_read_ahead_and_no_more() -> None:
    gate = asyncio.Event()

    async def application(socket: Socket) -> None:
        await socket.accept(None)
        await socket.receive()
        await socket.expect(1000)
        await gate.wait()
        await socket.close(1000)

    wire = Wire(application)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    for _ in range(100):
        wire.incoming.put_nowait({"type": "websocket.receive", "bytes": b"x"})
    running = asyncio.create_task(wire.run())
    await settle()
    assert wire.read == 1 + READ_AHEAD == 17
    gate.set()
    await running


async def test_who_waits_is_read_ahead_as_far_and_heard_to_leave() -> None:
    """By a plain server, whose calls are the back-pressure."""
    incoming: asyncio.Queue[Any] = asyncio.Queue()

    async def send(message: Any) -> None:
        pass

    for said in range(100):
        incoming.put_nowait({"type": "websocket.receive", "bytes": bytes([said])})
    socket = Socket({"type": "websocket", "extensions": None}, incoming.get, send)
    waiting = asyncio.create_task(socket.gone())
    await settle()
    assert incoming.qsize() == 100 - READ_AHEAD
    assert not waiting.done()
    waiting.cancel()
    assert [await socket.receive() for _ in range(18)] == [bytes([n]) for n in range(18)]
    while not incoming.empty():
        incoming.get_nowait()
    incoming.put_nowait({"type": "websocket.disconnect", "code": 1001})
    with pytest.raises(Disconnected):
        await asyncio.wait_for(Socket({}, incoming.get, send).gone(), 1)


class Bare:
    """A socket whose ingress says what it is told to, and nothing else."""

    def __init__(self) -> None:
        self.said, self.sent = asyncio.Queue[Any](), list[Any]()
        self.stuck = False
        self.socket = Socket({"extensions": {EXTENSION: {}}}, self.said.get, self._send)
        self.said.put_nowait({"type": "websocket.connect"})

    async def _send(self, message: Any) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def sending(self, size: int) -> asyncio.Task[None]:
        """One more, after what was said has been heard."""
        task = asyncio.create_task(self.socket.send(bytes(size)))
        await settle()
        return task


async def test_the_application_goes_on_when_enough_was_written_and_not_before() -> None:
    bare = Bare()
    await bare.socket.accept(None)
    assert (await bare.sending(3 * MAX_UNWRITTEN)).done()  # one of any size
    second = await bare.sending(1)
    for written, done in ((MAX_UNWRITTEN, False), (MAX_UNWRITTEN - 1, False), (1, True)):
        bare.said.put_nowait({"type": WRITTEN, "bytes": written})
        await settle()
        assert second.done() is done, written
    await bare.socket.close(1000)


async def test_a_sender_does_not_wait_for_who_is_gone() -> None:
    bare = Bare()
    await bare.socket.accept(None)
    await bare.sending(2 * MAX_UNWRITTEN)
    second = await bare.sending(1)
    assert not second.done()
    bare.said.put_nowait({"type": "websocket.disconnect", "code": 1006})
    await settle()
    assert isinstance(second.exception(), Disconnected)
    await bare.socket.close(1000)


async def test_who_does_not_take_the_goodbye_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of the connection runs on."""
    monkeypatch.setattr(front_socket, "GOODBYE_S", 0.01)
    for stuck in (False, True):
        bare = Bare()
        await bare.socket.accept(None)
        bare.stuck = stuck
        async with asyncio.timeout(20):
            await bare.socket.close(1000)
        assert [m["type"] for m in bare.sent[1:]] == ([] if stuck else ["websocket.close"])
        await settle()
        assert bare.socket._pump is not None
        assert bare.socket._pump.done()
        with pytest.raises(Disconnected):
            await bare.socket.send("more")


@pytest.mark.parametrize(
    ("size", "ahead"),
    [
        (1, READ_AHEAD),
        (1000, READ_AHEAD),
        (READ_AHEAD_BYTES // READ_AHEAD, READ_AHEAD),
        (READ_AHEAD_BYTES // READ_AHEAD + 1, READ_AHEAD - 1),
        (READ_AHEAD_BYTES // 3, 3),
        (READ_AHEAD_BYTES // 2, 2),
        (READ_AHEAD_BYTES // 2 + 1, 1),
        (10 * READ_AHEAD_BYTES, 1),  # one of any size
    ],
)
async def test_what_may_be_read_is_granted_as_large_as_it_is_expected(
    size: int, ahead: int
) -> None:
    """So many at first, the one that every connection has among them; then half of them for as many
    that were taken."""
    bare = Bare()
    await bare.socket.accept(None)

    def granted() -> list[Any]:
        return [(m["messages"], m["size"]) for m in bare.sent if m["type"] == GRANT]

    bare.said.put_nowait({"type": "websocket.receive", "text": "open"})
    await bare.socket.receive()
    assert granted() == [(1, FIRST_SIZE)]
    await bare.socket.expect(size)
    assert granted()[1:] == [(ahead - 1, size)]
    half = (ahead + 1) // 2
    for n in range(1, 3 * half + 1):
        bare.said.put_nowait({"type": "websocket.receive", "bytes": b"x"})
        await bare.socket.receive()
        assert granted()[2:] == [(half, size)] * (n // half)
    await bare.socket.close(1000)
