"""The way of a session's pixels between its front and its editor: one TCP connection.

A hop through Ray costs milliseconds on a small machine and a chunk would make three, so Ray carries
what opens and pins a session, and this what flows in it. The editor connects to the front's
`Inbox` with a secret that came through Ray, asks for work when it has room and sends back events;
when either end dies, the other sees the connection close. Nothing is unpickled: a message is a JSON
header and raw bytes.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.wire.work import Edited, EditorLostError, Moved, Work

LENGTH = struct.Struct("<I")
BUFFER = 8 * 2**20  # bytes that are read ahead
MAX_HEADER = 64 * 1024
HELLO_S = 5.0  # for the editor to connect, and for a stranger to say who it is


@dataclass(frozen=True)
class Address:
    """Where an editor fetches a stream's work, and the secret that lets it."""

    host: str
    port: int
    stream: str
    secret: str


class Link:
    """One end of the connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def write(self, header: dict[str, Any], *parts: bytes | memoryview) -> None:
        text = json.dumps({**header, "sizes": [len(part) for part in parts]}).encode()
        self._writer.write(LENGTH.pack(len(text)) + text)
        for part in parts:
            self._writer.write(part)
        await self._writer.drain()

    async def read(self) -> tuple[dict[str, Any], list[bytes]]:
        (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        if length > MAX_HEADER:
            raise ConnectionError(f"a header of {length} bytes")
        header = json.loads(await self._reader.readexactly(length))
        return header, [await self._reader.readexactly(size) for size in header.pop("sizes")]

    def close(self) -> None:
        self._writer.close()


def _bytes_of(frames: np.ndarray) -> memoryview:
    """uint8 frames, or none: a close after a whole chunk brings a last work without any."""
    return np.ascontiguousarray(frames).reshape(-1).data


# --- the editor's end


class EditorLink:
    """`take` is what `Engine.edit` asks for work with; `send` answers it."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @classmethod
    async def connect(cls, address: Address) -> EditorLink:
        """Raises OSError when the front cannot be reached."""
        async with asyncio.timeout(HELLO_S):
            streams = await asyncio.open_connection(address.host, address.port, limit=BUFFER)
        link = Link(*streams)
        await link.write({"stream": address.stream, "secret": address.secret})
        return cls(link)

    async def take(self) -> Work:
        """Raises ConnectionError when the front let go of the stream."""
        await self._link.write({"kind": "take"})
        try:
            header, (frames,) = await self._link.read()
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the front let go of the stream") from error
        pixels = np.frombuffer(frames, np.uint8).reshape(header["shape"])
        return Work(header["number"], header["prompt"], pixels, header["last"], header["more"])

    async def send(self, event: Edited | Moved) -> None:
        if isinstance(event, Moved):
            await self._link.write({"kind": "moved", "ahead": event.ahead}, event.state)
            return
        names = ("number", "index", "recomputed", "steps", "compute_ms", "ahead_ms", "wait_ms")
        header = {name: getattr(event, name) for name in names}
        header |= {"kind": "edited", "shape": event.frames.shape, "mask": None, "state": True}
        parts = [_bytes_of(event.frames)]
        if event.mask is not None:
            header["mask"] = event.mask.shape
        mask = b"" if event.mask is None else np.packbits(event.mask).tobytes()
        header["state"] = event.state is not None
        await self._link.write(header, *parts, mask, event.state or b"")

    def close(self) -> None:
        self._link.close()


# --- the front's end


class Slot:
    """A stream's place in the inbox. `put` answers the editor's `take`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.link: asyncio.Future[Link] = asyncio.get_running_loop().create_future()

    async def connected(self) -> None:
        """Raises EditorLostError when the editor does not connect in time."""
        try:
            async with asyncio.timeout(HELLO_S):
                await asyncio.shield(self.link)
        except TimeoutError:
            raise EditorLostError("the editor did not connect to the front") from None

    async def put(self, work: Work) -> None:
        header = {"number": work.number, "prompt": work.prompt, "last": work.last}
        header |= {"more": work.more, "shape": work.frames.shape}
        await self._guard(self.link.result().write(header, _bytes_of(work.frames)))

    async def next(self) -> Edited | Moved | None:
        """What the editor says; None when it asks for work. Raises EditorLostError."""
        header, parts = await self._guard(self.link.result().read())
        kind = header.pop("kind")
        if kind == "take":
            return None
        if kind == "moved":
            return Moved(parts[0], header["ahead"])
        shape, mask_shape, has_state = header.pop("shape"), header.pop("mask"), header.pop("state")
        mask = None
        if mask_shape:
            bits = np.unpackbits(np.frombuffer(parts[1], np.uint8), count=int(np.prod(mask_shape)))
            mask = bits.reshape(mask_shape).astype(bool)
        return Edited(
            frames=np.frombuffer(parts[0], np.uint8).reshape(shape),
            mask=mask,
            state=parts[2] if has_state else None,
            **header,
        )

    async def _guard(self, call: Any) -> Any:
        try:
            return await call
        except (OSError, asyncio.IncompleteReadError) as error:
            raise EditorLostError("the editor's connection closed") from error


class Inbox:
    """Listens for editors, on a port of its own of this front's host."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._slots: dict[str, Slot] = {}
        self._server: asyncio.Server | None = None

    async def open(self, stream: str) -> Slot:
        if self._server is None:
            self._server = await asyncio.start_server(self._welcome, self.host, 0, limit=BUFFER)
        port = self._server.sockets[0].getsockname()[1]
        slot = Slot(Address(self.host, port, stream, secrets.token_hex(16)))
        self._slots[stream] = slot
        return slot

    def close(self, slot: Slot) -> None:
        """Nobody answers the stream any more; its editor sees the connection close."""
        self._slots.pop(slot.address.stream, None)
        if slot.link.done() and not slot.link.cancelled():
            slot.link.result().close()
        slot.link.cancel()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(reader, writer)
        try:
            async with asyncio.timeout(HELLO_S):
                hello, _ = await link.read()
            slot = self._slots[hello["stream"]]
            if not hmac.compare_digest(str(hello["secret"]), slot.address.secret):
                raise ConnectionError("a wrong secret")
            slot.link.set_result(link)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            asyncio.IncompleteReadError,
            asyncio.InvalidStateError,
        ):
            link.close()  # a stranger, or a stream that is over
