"""Capacity follows demand on a Ray of its own: up by who waits, down by the empty editor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.runtime.ray_private import serve_replicas
from serve.client import Stream, connect
from serve.run import APP, Running, free_port, start
from serve.settings import ServeSettings
from serve.wire.protocol import InQueue, WireError

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def running(small_model: Path) -> Iterator[Running]:
    settings = ServeSettings(
        model=str(small_model), measured_capacity=False, max_sessions=2, min_editors=1,
        max_editors=2, downscale_delay_s=6.0, editor_cpus=0.5, front_cpus=0.25,
    )  # fmt: skip
    started = start(settings, port=free_port(), cpus=8)
    try:
        yield started
    finally:
        started.stop()


def editors() -> list[str]:
    return [r.name for r in serve_replicas(APP) if r.deployment == "editor" and r.running]


async def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, serve_replicas(APP)
        await asyncio.sleep(0.2)


class Client:
    """One that holds a session until it is told to end it."""

    def __init__(self, running: Running, *, waits: bool) -> None:
        self.places: list[InQueue] = []
        self.stream: Stream | None = None
        self._end = asyncio.Event()
        self._running, self._waits = running, waits
        self.task = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        heard = self.places.append if self._waits else None
        url = self._running.stream_url
        async with connect(url, "x", width=48, height=32, fps=1, on_queue=heard) as stream:
            self.stream = stream
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task


async def test_capacity_follows_demand_up_and_down(running: Running) -> None:
    (oldest,) = await asyncio.to_thread(editors)
    first = [Client(running, waits=False) for _ in range(2)]
    await until(lambda: all(client.stream for client in first), 20)

    # No room: one that does not wait is told so at once, one that waits hears its place.
    with pytest.raises(WireError) as refused:
        async with connect(running.stream_url, "x", width=48, height=32, fps=1):
            pass
    assert refused.value.code == "at_capacity"
    waiting = [Client(running, waits=True) for _ in range(2)]
    await until(lambda: all(client.places for client in waiting), 10)
    assert sorted(client.places[0].place for client in waiting) == [1, 2]
    assert all(client.places[0].expected_s > 0 for client in waiting)

    # A second editor is started for them, and takes both.
    await until(lambda: all(client.stream for client in waiting), 90)
    await until(lambda: len(editors()) == 2, 10)

    # Now the older one is the empty one. Serve would stop the newest, with its sessions.
    (newest,) = {*await asyncio.to_thread(editors)} - {oldest}
    for client in first:
        await client.end()
    await until(lambda: editors() == [newest], 60)
    for client in waiting:
        assert client.stream is not None
        assert client.stream.reconnects == 0
        assert not client.task.done()
        await client.end()


async def test_who_leaves_the_queue_is_not_waited_for(running: Running) -> None:
    await until(lambda: len(editors()) == 1, 60)
    held = [Client(running, waits=True) for _ in range(2)]
    await until(lambda: all(client.stream for client in held), 30)
    gone, next_one = Client(running, waits=True), None
    await until(lambda: bool(gone.places), 10)
    gone.task.cancel()
    await asyncio.gather(gone.task, return_exceptions=True)
    next_one = Client(running, waits=True)
    await until(lambda: bool(next_one.places), 10)
    await until(lambda: next_one.stream is not None or next_one.places[-1].place == 1, 10)
    await held[0].end()
    await until(lambda: next_one.stream is not None, 10)
    await held[1].end()
    await next_one.end()
