"""A server that is stopped finishes what has come in and says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from serve.client import ConnectError, EditedFrame, Event, Stream, connect
from serve.wire.protocol import Closed
from tests.serve.conftest import clip, serving

pytestmark = pytest.mark.anyio


async def test_a_stopped_server_edits_what_has_come_and_says_so(small_model: Path) -> None:
    """The camera goes on: what it sends afterwards is not edited, and no error either."""
    heard: list[Event] = []
    sent = 0

    async def film(stream: Stream) -> None:
        nonlocal sent
        for frame in clip(1000):
            await stream.send(frame)
            sent += 1
            await asyncio.sleep(0.01)

    async def watch(stream: Stream, stop: Callable[[], None]) -> None:
        async for event in stream.events():
            heard.append(event)
            if sum(isinstance(e, EditedFrame) for e in heard) == 9:
                stop()
                stream.set_prompt("blue")  # a page that does not know it yet

    with serving(small_model) as server:
        async with connect(server.url, "red", width=48, height=32, fps=16, mode="live") as stream:
            filming = asyncio.create_task(film(stream))
            with pytest.raises(ConnectError, match=r"was stopped; \d+ of \d+ frames are edited"):
                await watch(stream, partial(server.call, server.front.stop))
            filming.cancel()
            await asyncio.gather(filming, return_exceptions=True)
        while server.front.open_connections:
            await asyncio.sleep(0.01)
    edited = sum(isinstance(event, EditedFrame) for event in heard)
    assert heard[-1] == Closed(edited, "stopped")
    assert 9 < edited < sent
    assert stream.reconnects == 0


async def test_nobody_opens_at_a_stopped_server(small_model: Path) -> None:
    with serving(small_model) as server:
        server.call(server.front.stop)
        refusal = server.call(server.front._full)
    assert refusal is not None
    assert refusal.code == "draining"
