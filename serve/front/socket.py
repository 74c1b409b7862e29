"""The application's ends of a WebSocket and of HTTP's bodies, with back-pressure through Ray Serve.

Ray's proxy (and its direct ingress) reads a socket as fast as the client sends and buffers what the
application answers without bound: eight uploads side by side took 9 GB. `serve.ingress`, in the
process that owns the socket, reads it only as far as is granted here, and says what has been
written to it. Without it (plain uvicorn) the ASGI calls themselves are the back-pressure.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXTENSION = "liveedit.flow"
GRANT = "liveedit.grant"  # application -> middleware: so many more messages, so large, may be read
WRITTEN = "liveedit.written"  # middleware -> application: so many bytes went to the socket
RESIZE = "liveedit.resize"  # scope extension of `BoundedSocket`: its method that sets the limit
FIRST_SIZE = 4 * 2**20  # bytes of a message before the application says what it wants
READ_AHEAD = 16  # messages that may be read before the application asks for them
READ_AHEAD_BYTES = 4 * 2**20  # and at most so much of them, but one of any size
GOODBYE_S = 1.0
MAX_UNWRITTEN = 512 * 1024  # bytes the application may be ahead of the socket


class Disconnected(Exception):  # noqa: N818 - an event, not a fault
    """The client is gone; `code` is the close code, if it sent one."""

    def __init__(self, code: int) -> None:
        super().__init__(f"disconnected with code {code}")
        self.code = code


class Socket:
    """The application's end: accept, receive, send, close."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.closed = False
        self._receive, self._send = receive, send
        self._controlled = EXTENSION in (scope.get("extensions") or {})
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None
        self._taken = 0
        self._size, self._ahead = FIRST_SIZE, 1
        self._unwritten = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._left = asyncio.Event()

    async def accept(self, subprotocol: str | None) -> None:
        message = await self._receive()
        assert message["type"] == "websocket.connect", message["type"]
        await self._send({"type": "websocket.accept", "subprotocol": subprotocol})
        if self._controlled:
            self._pump = asyncio.create_task(self._read_ahead())

    async def expect(self, size: int) -> None:
        """From now on a message has at most `size` bytes; a larger one ends the connection, and a
        few are read ahead."""
        before = self._ahead
        self._size = size
        self._ahead = max(1, min(READ_AHEAD, READ_AHEAD_BYTES // size))
        if self._pump:
            await self._grant(self._ahead - before)

    async def gone(self) -> None:
        """Raises Disconnected when the client goes, while nobody calls `receive`."""
        while not self._pump and self._inbox.qsize() < READ_AHEAD:
            message = await self._receive()
            self._inbox.put_nowait(message)
            if message["type"] == "websocket.disconnect":
                self._gone()
                break
        await self._left.wait()
        raise Disconnected(1006)

    async def receive(self) -> str | bytes:
        """The next message. Raises Disconnected."""
        ahead = self._pump or not self._inbox.empty()
        message = await (self._inbox.get() if ahead else self._receive())
        if message["type"] == "websocket.disconnect":
            self._gone()
            raise Disconnected(message.get("code") or 1005)
        if self._pump:
            self._taken += 1
            if self._taken >= (self._ahead + 1) // 2:
                taken, self._taken = self._taken, 0
                await self._grant(taken)
        text: str | None = message.get("text")
        return text if text is not None else message["bytes"]

    async def send(self, data: str | bytes) -> None:
        """Returns when the socket is not too far behind. Raises Disconnected."""
        await self._writable.wait()
        if self.closed:
            raise Disconnected(1006)
        if self._pump:
            self._unwritten += len(data)
            if self._unwritten > MAX_UNWRITTEN:
                self._writable.clear()
        kind = "text" if isinstance(data, str) else "bytes"
        try:
            await self._send({"type": "websocket.send", kind: data})
        except (OSError, RuntimeError) as error:  # uvicorn and Ray, when the peer is gone
            self._gone()
            raise Disconnected(1006) from error

    async def close(self, code: int) -> None:
        """Says goodbye if somebody is there and takes it in time, and ends."""
        try:
            if not self.closed:
                async with asyncio.timeout(GOODBYE_S):
                    await self._send({"type": "websocket.close", "code": code})
        except (OSError, RuntimeError, TimeoutError):
            return  # gone already, or stuck
        finally:
            self._gone()
            if self._pump:
                self._pump.cancel()

    async def _read_ahead(self) -> None:
        """Takes in what the middleware says; it reads the socket no further than was granted."""
        while True:
            message = await self._receive()
            if message["type"] == WRITTEN:
                self._unwritten -= message["bytes"]
                if self._unwritten <= MAX_UNWRITTEN:
                    self._writable.set()
                continue
            self._inbox.put_nowait(message)
            if message["type"] == "websocket.disconnect":
                self._gone()
                return

    async def _grant(self, messages: int) -> None:
        try:
            await self._send({"type": GRANT, "messages": messages, "size": self._size})
        except (OSError, RuntimeError):
            self._gone()

    def _gone(self) -> None:
        self.closed = True
        self._writable.set()
        self._left.set()


class BodyFlow:
    """ASGI middleware for routes with large bodies: reads on when `app` has taken a piece, and lets
    `app` be ahead of the socket by `MAX_UNWRITTEN` bytes.

    A client that reads nothing for `stalled_s` counts as gone.
    """

    def __init__(self, app: ASGIApp, stalled_s: float) -> None:
        self.app, self.stalled_s = app, stalled_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if EXTENSION not in (scope.get("extensions") or {}):
            await self.app(scope, receive, send)
            return
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        writable = asyncio.Event()
        writable.set()
        unwritten = 0

        async def pump() -> None:
            nonlocal unwritten
            while True:
                message = await receive()
                if message["type"] != WRITTEN:
                    inbox.put_nowait(message)
                    if message["type"] == "http.disconnect":
                        writable.set()
                        return
                    continue
                unwritten -= message["bytes"]
                if unwritten <= MAX_UNWRITTEN:
                    writable.set()

        async def taken() -> Message:
            message = await inbox.get()
            if message["type"] == "http.request" and message.get("more_body"):
                await send({"type": GRANT, "messages": 1, "size": 0})
            return message

        async def sent(message: Message) -> None:
            nonlocal unwritten
            try:
                async with asyncio.timeout(self.stalled_s):
                    await writable.wait()
            except TimeoutError:
                inbox.put_nowait({"type": "http.disconnect"})
            unwritten += len(message.get("body", b""))
            if unwritten > MAX_UNWRITTEN:
                writable.clear()
            await send(message)

        pumping = asyncio.create_task(pump())
        try:
            await self.app(scope, taken, sent)
        finally:
            pumping.cancel()
