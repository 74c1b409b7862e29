"""Back-pressure in the process that owns the sockets: a Serve HTTP middleware.

It reads a WebSocket or a request's body no further than the application has granted, no message
larger than the application wants, and says what has been written. The application's ends of both
are in `serve.front.socket`.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.front.socket import EXTENSION, GRANT, RESIZE, WRITTEN

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
        scope = {**scope, "extensions": {**extensions, EXTENSION: {}}}
        # A WebSocket's are for the connect message and the first one.
        grants = asyncio.Semaphore(2 if scope["type"] == "websocket" else BODY_AHEAD)
        written: asyncio.Queue[Message] = asyncio.Queue()
        reading: asyncio.Task[Message] | None = None

        async def read() -> Message:
            await grants.acquire()
            return await receive()

        async def controlled_receive() -> Message:
            nonlocal reading
            reading = reading or asyncio.ensure_future(read())
            telling = asyncio.ensure_future(written.get())
            try:
                await asyncio.wait({reading, telling}, return_when=asyncio.FIRST_COMPLETED)
                if telling.done():
                    return telling.result()
                message, reading = reading.result(), None
                return message
            finally:
                telling.cancel()

        async def controlled_send(message: Message) -> None:
            if message["type"] == GRANT:
                resize(message["size"])
                for _ in range(message["messages"]):
                    grants.release()
                return
            await send(message)
            size = len(next((message[key] for key in DATA if message.get(key)), ""))
            if size:
                written.put_nowait({"type": WRITTEN, "bytes": size})

        try:
            await self.app(scope, controlled_receive, controlled_send)
        finally:
            if reading is not None:
                reading.cancel()
