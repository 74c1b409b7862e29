"""What a hostile client does beside honest cameras: for `liveedit bench serve --attack`.

Each runs until it is cancelled, and needs no more than any client has. `floods` has those on the
process that owns the sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_socket
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from serve.client.api import connect
from serve.client.floods import FLOODS
from serve.client.stream import ConnectError, stream_url
from serve.wire import codec
from serve.wire.protocol import SUBPROTOCOL, Open, Prompt, WireError, to_json

Attack = Callable[[str, int, int, str | None], Awaitable[None]]  # url, width, height, token

BOMB = 62_000  # bytes: ten seconds of decoding at 1280x720, where scans are not bounded
LARGE_BOMB = 571_000  # and 165 s
LARGE = (1280, 720)  # pixels of the bombs, whatever cameras send
UPLOADS = 330
PAUSE_S = 0.05  # between two bombs, and before a flood goes on that was turned away


def bomb(width: int, height: int, size: int = BOMB) -> bytes:
    """A progressive JPEG of `size` bytes whose last scan comes again and again."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    picture.save(buffer, "JPEG", progressive=True)
    image = buffer.getvalue()
    scan = image[image.rindex(codec.SCAN) : -2]
    return image[:-2] + scan * max(1, (size - len(image)) // len(scan)) + image[-2:]


async def bombs(size: int, url: str, width: int, height: int, token: str | None) -> None:
    """Opens, sends a bomb and leaves without waiting for what becomes of it."""
    frame = struct.pack("<IIQ", 0, 0, 0) + bomb(*LARGE, size)
    while True:
        with contextlib.suppress(OSError, WebSocketException):
            # Worked at a size that is taken where the large one would cost too much.
            async with _raw(url, *LARGE, token, work_size="96x64") as socket:
                await socket.send(frame)
        await asyncio.sleep(PAUSE_S)


async def slow_upload(url: str, width: int, height: int, token: str | None) -> None:
    """Uploads that begin and stop, and begin again when they were turned away."""
    parts = urlsplit(stream_url(url))
    head = (
        f"POST /v1/edits HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 1000000\r\n"
        f"Authorization: Bearer {token}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    ).encode()

    async def upload() -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
                try:
                    writer.write(head)
                    await reader.read()  # until the server has had enough
                finally:
                    writer.close()
            await asyncio.sleep(1.0)

    await asyncio.gather(*(upload() for _ in range(UPLOADS)))


async def false_fps(url: str, width: int, height: int, token: str | None) -> None:
    """Lossless at the lowest rate that is taken, by its word; sent as fast as it goes."""
    picture = np.zeros((height, width, 3), np.uint8)
    while True:
        with contextlib.suppress(WireError, ConnectError):
            async with (
                connect(
                    url, "x", width=width, height=height, fps=1.0, mode="lossless", token=token
                ) as stream,
                asyncio.TaskGroup() as tasks,
            ):
                reading = tasks.create_task(_drain(stream.events()))
                while not reading.done():
                    await stream.send(picture)
        await asyncio.sleep(1.0)


async def prompt_flood(url: str, width: int, height: int, token: str | None) -> None:
    """Long instructions, as fast as they go, and again when it was turned away."""
    while True:
        with contextlib.suppress(OSError, WebSocketException):
            async with _raw(url, width, height, token) as socket:
                while True:
                    await socket.send(to_json(Prompt("x" * 1900)))
        await asyncio.sleep(PAUSE_S)


async def prompt_switch(url: str, width: int, height: int, token: str | None) -> None:
    """Another instruction, which the model has never met, with every frame."""
    picture = np.zeros((height, width, 3), np.uint8)
    for number in itertools.count():
        with contextlib.suppress(WireError, ConnectError):
            async with (
                connect(url, "x", width=width, height=height, fps=16.0, token=token) as stream,
                asyncio.TaskGroup() as tasks,
            ):
                reading = tasks.create_task(_drain(stream.events()))
                for frame in itertools.count():
                    if reading.done():
                        break
                    stream.set_prompt(f"make it {number} {frame}")
                    await stream.send(picture)
                    await asyncio.sleep(1 / 16)
        await asyncio.sleep(1.0)


async def open_close(url: str, width: int, height: int, token: str | None) -> None:
    """Opens, is let in or not, and leaves."""
    await _again_and_again(8, lambda number: _raw(url, width, height, token))


async def leave_queue(url: str, width: int, height: int, token: str | None) -> None:
    """Gets its place in the queue, and is gone without a word."""
    await _again_and_again(
        32,
        lambda number: _raw(url, width, height, token, queue=True),
        lambda socket: socket.transport.abort(),
    )


async def wrong_resume(url: str, width: int, height: int, token: str | None) -> None:
    """Comes back to sessions that never were."""
    await _again_and_again(
        16, lambda number: _raw(url, width, height, token, resume=f"{number:032x}")
    )


async def _again_and_again(
    many: int,
    come: Callable[[int], AbstractAsyncContextManager[ClientConnection]],
    leave: Callable[[ClientConnection], None] = lambda socket: None,
) -> None:
    """`many` clients, each of which comes, for the n-th time, and leaves."""

    async def one() -> None:
        for number in itertools.count():
            with contextlib.suppress(OSError, WebSocketException):
                async with come(number) as socket:
                    leave(socket)

    await asyncio.gather(*(one() for _ in range(many)))


@contextlib.asynccontextmanager
async def _raw(
    url: str, width: int, height: int, token: str | None, **asked: Any
) -> AsyncIterator[ClientConnection]:
    """A socket on which an open was said and answered, whatever the answer is."""
    async with connect_socket(
        stream_url(url), subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None,
        additional_headers={"Authorization": f"Bearer {token}"} if token else None,
    ) as socket:  # fmt: skip
        await socket.send(to_json(Open("x", width, height, 16.0, "lossless", "jpeg", **asked)))
        await socket.recv()
        yield socket


async def _drain(events: object) -> None:
    async for _ in events:  # type: ignore[attr-defined]
        pass


ATTACKS: dict[str, Attack] = {
    "slow-upload": slow_upload,
    "scan-bomb": partial(bombs, BOMB),
    "large-scan-bomb": partial(bombs, LARGE_BOMB),
    "false-fps": false_fps,
    "prompt-flood": prompt_flood,
    "prompt-switch": prompt_switch,
    "open-close": open_close,
    "leave-queue": leave_queue,
    "wrong-resume": wrong_resume,
    **FLOODS,
}
