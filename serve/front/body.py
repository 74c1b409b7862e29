"""The application's end of HTTP's bodies, with back-pressure as a WebSocket has it
(`serve.front.socket`)."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.front.socket import EXTENSION, GRANT, MAX_UNWRITTEN, WRITTEN


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
