"""What strangers do: nonsense, cut connections, slow reading. The server keeps serving.

The sizes grow with LIVEEDIT_ROBUSTNESS (a factor; 50 gives 10,000 messages and 500 connections).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import socket as socketlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_socket
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from serve.client import Stream, WireError, connect, edit_frames
from serve.limits import Limits
from serve.wire import codec
from tests.serve.conftest import Server, clip, serving

pytestmark = pytest.mark.anyio

FACTOR = float(os.environ.get("LIVEEDIT_ROBUSTNESS", "1"))
OPEN = {
    "type": "open", "prompt": "make it red", "width": 48, "height": 32, "fps": 16,
    "mode": "lossless", "format": "jpeg",
}  # fmt: skip
LEFT = 64 * 2**20  # bytes that memory may have grown by afterwards
IMAGE = codec.encode(clip(1)[0], "jpeg")


@pytest.fixture(scope="module")
def strong(small_model: Path) -> Iterator[Server]:
    with serving(small_model, Limits(resume_s=0.5), max_sessions=64) as running:
        yield running


def socket(server: Server, **options: Any) -> connect_socket:
    url = f"{server.url}/v1/stream"
    subprotocols = [Subprotocol("liveedit.v1")]
    return connect_socket(
        url, subprotocols=subprotocols, compression=None, open_timeout=60, **options
    )


def nonsense(generator: random.Random) -> str | bytes:
    """A message that no client of the protocol sends."""
    change = generator.choice(
        [{"width": -1}, {"fps": None}, {"mode": 3}, {"format": "exe"}, {"x": 1}, {"prompt": []}]
    )
    return generator.choice(
        [
            generator.randbytes(generator.randrange(1, 200)),
            struct.pack("<IIQ", generator.randrange(1, 2**32), 0, 0) + IMAGE,
            struct.pack("<IIQ", 0, 0, 0) + IMAGE[: generator.randrange(1, len(IMAGE) // 2)],
            generator.randbytes(50).decode("latin-1"),
            json.dumps(OPEN | change),
            json.dumps({"type": generator.choice(["opened", "", "open", "chunk"])}),
            "[" * generator.randrange(1, 5000),
            json.dumps({"type": "prompt", "prompt": "\ud800"}),
        ]
    )


async def converse(server: Server, generator: random.Random) -> str | None:
    """Sends nonsense, first or after an open; returns the error's code."""
    async with socket(server) as connection:
        try:
            if generator.random() < 0.5:
                await connection.send(json.dumps(OPEN))
                await connection.recv()
            await connection.send(nonsense(generator))
            while True:
                data = await connection.recv()
                message = json.loads(data) if isinstance(data, str) else {}
                if message.get("type") == "error":
                    return str(message["code"])
        except ConnectionClosed:
            return None


async def test_nonsense_is_answered_and_serving_goes_on(strong: Server) -> None:
    generator = random.Random(0)
    codes: list[str | None] = []

    async def some(count: int) -> int:
        for _ in range(count):
            codes.extend(await asyncio.gather(*(converse(strong, generator) for _ in range(10))))
        return await resident(strong)

    before = await some(3)
    after = await some(int(20 * FACTOR))
    assert after - before < LEFT, f"memory grew by {(after - before) / 2**20:.0f} MiB"
    assert set(codes) <= {"bad_request", "bad_frame", "unsupported_size", "at_capacity"}
    assert len(list(edit_frames(strong.url, clip(12), "make it red", fps=16))) == 12


async def resident(server: Server) -> int:
    """Bytes of memory that this process, so the server, holds when every session is over."""
    await settled(server)
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def vanish(server: Server, generator: random.Random) -> None:
    """Opens, sends some frames, and is gone without a word."""
    connection: ClientConnection
    async with socket(server) as connection:
        await connection.send(json.dumps(OPEN))
        try:
            await connection.recv()
            for n in range(generator.randrange(0, 30)):
                await connection.send(struct.pack("<IIQ", n, 0, 0) + IMAGE)
        except ConnectionClosed:
            return  # at capacity
        connection.transport.abort()


async def settled(server: Server) -> None:
    """Until nothing of a session is left at the front, the editor and the store."""
    engine = server.engine
    store = server.front.services.store
    for _ in range(1200):
        left = (len(server.front.connections), len(engine.capacity.loads), len(store))
        if left == (0, 0, 0):
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"left behind: {left} connections, streams and records")


async def test_cut_connections_leave_nothing_behind(strong: Server) -> None:
    generator = random.Random(1)

    async def some(count: int) -> int:
        for _ in range(count):
            await asyncio.gather(*(vanish(strong, generator) for _ in range(5)))
        return await resident(strong)

    before = await some(2)
    after = await some(int(2 * FACTOR) + 1)
    assert after - before < LEFT, f"memory grew by {(after - before) / 2**20:.0f} MiB"
    assert len(list(edit_frames(strong.url, clip(12), "make it red", fps=16))) == 12


async def test_a_slow_reader_slows_only_itself(small_model: Path) -> None:
    frames = clip(150, width=96, height=96)
    with serving(small_model, Limits(stalled_reader_s=1.0), max_sessions=8) as server:
        narrow = socketlib.socket()
        narrow.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_RCVBUF, 32 * 1024)
        narrow.connect(("127.0.0.1", server.port))
        async with socket(server, sock=narrow, close_timeout=0.1) as slow:
            await slow.send(json.dumps(OPEN | {"width": 96, "height": 96, "format": "rgb24"}))
            await slow.recv()
            slow.transport.pause_reading()

            async def flood() -> None:
                for n, frame in enumerate(frames):
                    await slow.send(struct.pack("<IIQ", n, 0, 0) + frame.tobytes())

            flooding = asyncio.create_task(flood())
            connection = next(iter(server.front.connections))
            assert connection.running is not None
            session = connection.running.session
            async with connect(server.url, "x", width=48, height=32, fps=16) as other:
                sending = asyncio.create_task(send_all(other, clip(120)))
                got = [edited.index async for edited in other]
                await sending
            assert got == list(range(120))
            while connection in server.front.connections:
                await asyncio.sleep(0.05)
            assert session.next_frame < 120, "the server read on without bound"
            flooding.cancel()
        (ended,) = server.front.services.metrics.ended.collect()
        totals = [sample for sample in ended.samples if sample.name.endswith("_total")]
        assert {one.labels["reason"]: one.value for one in totals} == {"close": 1, "too_slow": 1}


async def send_all(stream: Stream, frames: np.ndarray) -> None:
    for frame in frames:
        await stream.send(frame)
    stream.finish()


async def test_an_editor_that_fails_is_an_internal_error_not_a_hang(small_model: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken weights")

    with serving(small_model) as server:
        server.engine.editor.vae.decode = fail
        async with socket(server) as connection:
            await connection.send(json.dumps(OPEN))
            await connection.recv()
            for n in range(9):
                await connection.send(struct.pack("<IIQ", n, 0, 0) + IMAGE)
            error = json.loads(await asyncio.wait_for(connection.recv(), 60))
        assert (error["type"], error["code"]) == ("error", "internal")
        assert "broken weights" not in error["message"]
        with pytest.raises(WireError, match="its log says why"):
            list(edit_frames(server.url, clip(9), "make it red", fps=16))
