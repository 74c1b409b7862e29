"""Back-pressure in the process that owns the sockets: a Serve HTTP middleware.

It reads a WebSocket or a request's body no further than the application has granted, no message
larger than the application wants, and says what has been written. A hop through Ray takes two
milliseconds and as much of a core, so an application that says where it listens is connected to:
from then on a WebSocket's messages go over that link, and Ray carries only its beginning and end.
The application's ends are in `serve.front.socket` and `body`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.front.socket import EXTENSION, GRANT, LINK, RESIZE, TEXT, WRITTEN
from serve.wire.link import Address, Link

log = logging.getLogger(__name__)

BODY_AHEAD = 8  # pieces of a body, of some 64 KB each, that may be read before they are asked for
DATA = ("bytes", "text", "body")  # keys of what goes to the client, in any kind of message


class FlowControl:
    """ASGI middleware for the process that owns the socket."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("websocket", "http"):
            await self.app(scope, receive, send)
            return
        extensions = dict(scope.get("extensions") or {})
        resize = extensions.pop(RESIZE, lambda size: None)  # a function cannot go to a replica
        scope = {**scope, "extensions": {**extensions, EXTENSION: {LINK: True}}}
        # A WebSocket's are for the connect message and the first one.
        grants = 2 if scope["type"] == "websocket" else BODY_AHEAD
        await _Client(receive, send, resize, grants).run(self.app, scope)


class _Client:
    """One connection: `receive` and `send` are the client's end, ASGI or a link the application's.

    `grants` messages may be read before the application grants more.
    """

    def __init__(
        self, receive: Receive, send: Send, resize: Callable[[int], None], grants: int
    ) -> None:
        self._receive, self._send, self._resize = receive, send, resize
        self._grants = asyncio.Semaphore(grants)
        self._inward: asyncio.Queue[Message] = asyncio.Queue()  # to the application through ASGI
        self._outward: asyncio.Queue[Message | None] = asyncio.Queue()  # from it over the link
        self._link: Link | None = None
        self._linked: list[asyncio.Task[None]] = []  # what the link needs
        self._goodbye: Message | None = None  # the client's

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        reading = asyncio.create_task(self._read())
        try:
            await app(scope, self._inward.get, self._said_through_asgi)
            await asyncio.gather(*self._linked)
        finally:
            for task in (reading, *self._linked):
                task.cancel()

    async def _read(self) -> None:
        while True:
            await self._grants.acquire()
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                self._goodbye = message
            await self._tell(message)

    async def _tell(self, message: Message) -> None:
        """The application."""
        if self._link is not None:
            try:
                await self._link.write(_in_bytes(message))
            except OSError as error:  # of which the application's end follows
                log.debug("an application is not told %s: %s", message["type"], error)
        if not self._linked or message is self._goodbye:  # which Ray counts
            self._inward.put_nowait(message)

    async def _said_through_asgi(self, message: Message) -> None:
        if message["type"] == LINK:
            address = Address(message["host"], message["port"], message["secret"])
            self._linked = [
                asyncio.create_task(self._hear(address)), asyncio.create_task(self._relay())
            ]  # fmt: skip
            return
        await asyncio.gather(*self._linked)  # a goodbye comes after all that was said before
        await self._said(message)

    async def _hear(self, address: Address) -> None:
        """What the application says over the link, as soon as it is here: the link may end before
        the client has taken it."""
        try:
            self._link = await Link.connect(address, ())
            while True:
                self._outward.put_nowait(await self._link.read())
        except OSError as error:
            log.debug("an application says no more: %s", error)
        finally:
            if self._link is not None:
                self._link.close()
                self._link = None
            self._outward.put_nowait(None)

    async def _relay(self) -> None:
        try:
            while (message := await self._outward.get()) is not None:
                await self._said(message)
        except (OSError, RuntimeError):  # the client is gone, of which nobody may hear otherwise
            self._goodbye = {"type": "websocket.disconnect", "code": 1006}
            await self._tell(self._goodbye)

    async def _said(self, message: Message) -> None:
        """By the application."""
        if message["type"] == GRANT:
            self._resize(message["size"])
            for _ in range(message["messages"]):
                self._grants.release()
            return
        await self._send(message)
        size = len(next((message[key] for key in DATA if message.get(key)), ""))
        if size:
            await self._tell({"type": WRITTEN, "bytes": size})


def _in_bytes(message: Message) -> Message:
    """As a link carries any length of it."""
    if message.get("text") is None:
        return message
    return {"type": message["type"], TEXT: message["text"].encode()}
