"""The application's end of a WebSocket, with back-pressure through Ray Serve.

Ray's proxy (and its direct ingress) reads a socket as fast as the client sends and buffers what the
application answers without bound: eight uploads side by side took 9 GB. `serve.ingress`, in the
process that owns the socket, reads it only as far as is granted here, and says what has been
written to it. Without it (plain uvicorn) the ASGI calls themselves are the back-pressure.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from serve.wire.link import HELLO_S, Link, Listener

log = logging.getLogger(__name__)

EXTENSION = "liveedit.flow"
GRANT = "liveedit.grant"  # application -> middleware: so many more messages, so large, may be read
WRITTEN = "liveedit.written"  # middleware -> application: so many bytes went to the socket
LINK = "liveedit.link"  # application -> middleware: all messages but the goodbye go over a link
TEXT = "liveedit.text"  # key of a message that came over a link: its text, in bytes
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
    """The application's end: accept, receive, send, close.

    `listener` is where the process that owns the socket connects to, so that messages need not go
    through Ray; for links of no `kinds`. None: they all do.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, listener: Listener | None = None
    ) -> None:
        self.scope = scope
        self.closed = False
        self._receive, self._send = receive, send
        flow = (scope.get("extensions") or {}).get(EXTENSION)
        self._controlled = flow is not None
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        # An ingress that was started with a former version of the code knows no links.
        self._listener = listener if flow and flow.get(LINK) else None
        self._link: Link | None = None
        self._pump: asyncio.Task[None] | None = None  # what is said through ASGI
        self._hearing: asyncio.Task[None] | None = None  # and over the link
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
            self._pump = asyncio.create_task(self._hear(self._receive))

    async def expect(self, size: int) -> None:
        """From now on a message has at most `size` bytes; a larger one ends the connection, and a
        few are read ahead, over a link where there is a listener.

        Raises Disconnected, also when the process that owns the socket does not connect.
        """
        if self._pump and self._listener and self._link is None:
            await self._connect(self._listener)
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
            # Not before the link: a message through Ray could come later than one over it.
            if self._taken >= (self._ahead + 1) // 2 and (self._link or not self._listener):
                await self._grant(0)
        if TEXT in message:
            return str(message[TEXT], "utf-8")
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
            await (self._link.write if self._link else self._send)(
                {"type": "websocket.send", kind: data}
            )
        except (OSError, RuntimeError) as error:  # uvicorn and Ray, when the peer is gone
            self._gone()
            raise Disconnected(1006) from error

    async def close(self, code: int) -> None:
        """Says goodbye if somebody is there and takes it in time, and ends."""
        try:
            if not self.closed:
                async with asyncio.timeout(GOODBYE_S):
                    if self._link and self._hearing:
                        self._link.finish()
                        await self._hearing  # so long as the other end has not all of it
                    await self._send({"type": "websocket.close", "code": code})
        except (OSError, RuntimeError, TimeoutError):
            return  # gone already, or stuck
        finally:
            self.end()

    def end(self) -> None:
        """Nothing of the connection is left here, said goodbye or not."""
        self._gone()
        for task in (self._pump, self._hearing):
            if task:
                task.cancel()
        if self._link:
            self._link.close()

    async def _connect(self, listener: Listener) -> None:
        """No message may be on its way through ASGI: none is granted until this is done."""
        came: asyncio.Future[Link] = asyncio.get_running_loop().create_future()

        async def welcome(link: Link) -> None:
            came.set_result(link)

        address = await listener.expect(welcome)
        leaving = asyncio.ensure_future(self._left.wait())
        try:
            await self._send({"type": LINK, **asdict(address)})
            waiting: set[asyncio.Future[Any]] = {came, leaving}
            await asyncio.wait(waiting, timeout=HELLO_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listener.forget(address)
            leaving.cancel()
        if not came.done():
            if not self.closed:
                log.error(
                    "the process that owns a client's socket did not connect to %s:%d within %g s",
                    address.host, address.port, HELLO_S,
                )  # fmt: skip
            raise Disconnected(1006)
        if self._pump:
            self._pump.cancel()  # what it would still hear may overtake what the link brings
        self._link = came.result()
        self._hearing = asyncio.create_task(self._hear(self._link.read))

    async def _hear(self, receive: Receive) -> None:
        """Takes in what the middleware says; it reads the socket no further than was granted."""
        while True:
            try:
                message = await receive()
            except OSError:  # a link that ended
                message = {"type": "websocket.disconnect", "code": 1006}
            if message["type"] == WRITTEN:
                self._unwritten -= message["bytes"]
                if self._unwritten <= MAX_UNWRITTEN:
                    self._writable.set()
                continue
            self._inbox.put_nowait(message)
            if message["type"] == "websocket.disconnect":
                self._gone()
                return

    async def _grant(self, more: int) -> None:
        """In place of those that were taken, and `more`."""
        messages, self._taken = self._taken + more, 0
        try:
            await (self._link.write if self._link else self._send)(
                {"type": GRANT, "messages": messages, "size": self._size}
            )
        except (OSError, RuntimeError):
            self._gone()

    def _gone(self) -> None:
        self.closed = True
        self._writable.set()
        self._left.set()
