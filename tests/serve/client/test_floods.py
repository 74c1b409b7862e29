"""Floods do what they say and begin again; that the ingress bears them is in `test_ingress`."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from serve.client import floods
from serve.client.floods import FLOODS

pytestmark = pytest.mark.anyio

ENOUGH = 200_000  # bytes, after which the server has had enough
BEGINS = {
    "half-request": b"GET /healthz HTTP/1.1\r\n",
    "long-header": b"GET /healthz HTTP/1.1\r\nX-Long: aaaa",
    "endless-body": b"POST /healthz HTTP/1.1\r\n",
    "fast-upload": b"POST /v1/edits HTTP/1.1\r\n",
    "pings": b"GET /v1/stream HTTP/1.1\r\n",
    "fragments": b"GET /v1/stream HTTP/1.1\r\n",
    "silent": b"GET /v1/stream HTTP/1.1\r\n",
}
POURS = ("long-header", "endless-body", "fast-upload", "pings", "fragments")


@pytest.mark.parametrize("name", list(FLOODS))
async def test_a_flood_begins_again_when_it_was_ended(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floods, "SOCKETS", 3)
    monkeypatch.setattr(floods, "PAUSE_S", 0.01)
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(40)
        if b"/v1/stream" in first:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        if name in POURS:
            first += await reader.readexactly(ENOUGH)
        got.append(first)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    flood = asyncio.ensure_future(FLOODS[name](url, 48, 32, "secret"))
    async with asyncio.timeout(30):
        while len(got) < 20:
            assert not flood.done(), flood.exception()
            await asyncio.sleep(0.01)
    flood.cancel()
    server.close()
    assert all(first.startswith(BEGINS[name]) for first in got)
    if name == "fast-upload":
        assert b"Authorization: Bearer secret\r\n" in got[0]


SIDE_BY_SIDE = {
    "half-request": 5, "long-header": 1, "endless-body": 4, "fast-upload": 8, "pings": 3,
    "fragments": 2, "silent": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", list(FLOODS))
async def test_a_flood_has_so_many_connections_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And makes no more of them while these are open."""
    monkeypatch.setattr(floods, "SOCKETS", 5)
    monkeypatch.setattr(floods, "PAUSE_S", 0.001)
    came = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        came += 1
        if b"/v1/stream" in await reader.read(40):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        await over.wait()
        writer.transport.abort()

    over = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    flood = asyncio.ensure_future(FLOODS[name](url, 48, 32, "secret"))
    async with asyncio.timeout(30):
        while came < SIDE_BY_SIDE[name]:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.05)
    assert came == SIDE_BY_SIDE[name]
    flood.cancel()
    over.set()
    server.close()


async def test_a_connection_that_broke_is_ended_before_the_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a flood is out of descriptors before its server is."""
    monkeypatch.setattr(floods, "PAUSE_S", 60.0)
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        ended.set()
        writer.close()

    async def attack(connection: floods.StreamPair) -> None:
        raise OSError("turned away")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    flood = asyncio.ensure_future(floods._again(url, 1, attack))
    async with asyncio.timeout(20):
        await ended.wait()
    flood.cancel()
    server.close()
