"""A server that does as a script tells it, and a client that opens there."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from serve.client import connect
from serve.client.stream import Stream

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
