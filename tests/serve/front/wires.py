"""A client's wire with an ingress that buffers without bound, as Ray's does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from serve.front.socket import (
    Socket,
)
from serve.ingress.backpressure import FlowControl
from serve.wire.link import Listener


class Wire:
    """The socket's side of an ASGI server, and a buffering ingress between it and the app."""

    def __init__(self, application: Any, listener: Listener | None = None) -> None:
        self.listener = listener
        self.through_ingress: list[str] = []  # types of messages
        self.read = 0  # messages taken from the client
        self.sent: list[Any] = []  # messages given to the client
        self.writable = asyncio.Event()
        self.writable.set()
        self.left: Exception | None = None  # when the client is gone
        self.incoming: asyncio.Queue[Any] = asyncio.Queue()
        self.application = application

    async def run(self) -> None:
        scope = {"type": "websocket", "extensions": None, "subprotocols": []}
        await FlowControl(self.ingress)(scope, self.receive, self.send)

    async def receive(self) -> Any:
        message = await self.incoming.get()
        self.read += message["type"] == "websocket.receive"
        return message

    async def send(self, message: Any) -> None:
        await self.writable.wait()
        await asyncio.sleep(0)  # as who has something to do
        if self.left:
            raise self.left
        self.sent.append(message)

    async def ingress(self, scope: Any, receive: Any, send: Any) -> None:
        """Reads and answers as fast as it can, with two unbounded queues."""
        inward: asyncio.Queue[Any] = asyncio.Queue()
        outward: asyncio.Queue[Any] = asyncio.Queue()

        async def pump_in() -> None:
            while True:
                message = await receive()
                self.through_ingress.append(message["type"])
                if message["type"] != "websocket.disconnect" or not self.listener:
                    inward.put_nowait(message)  # else later than over the link

        async def pump_out() -> None:
            while True:
                message = await outward.get()
                self.through_ingress.append(message["type"])
                await send(message)
                outward.task_done()

        pumps = [asyncio.create_task(pump_in()), asyncio.create_task(pump_out())]
        try:
            socket = Socket(scope, inward.get, outward.put, self.listener)
            try:
                await self.application(socket)
            finally:
                socket.end()
            await outward.join()
        finally:
            for pump in pumps:
                pump.cancel()


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)
