"""An application that changes while it runs, on a Ray of its own: capacity follows demand, up by
who waits and down by the empty editor, and the model its alias in a real registry."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from infra.runtime.ray_private import serve_replicas
from serve.client import Stream, connect
from serve.run import APP, Running, free_port, start
from serve.settings import ServeSettings
from serve.wire.protocol import InQueue, WireError
from tests.known_editors import (
    PAINTS,
    TOLERANCE,
    TURNED,
    Paints,
    block_clip,
    expected_edit,
    write_known_model,
)
from tests.serve.registry import Registry

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]


FRAME = block_clip(1, 64, 96)[0]
MODEL = "models:/turning@production"


def version(registry: Registry, folder: Path, paints: Paints, **config: str) -> None:
    """The next of "turning"; `config` are fields of its file that say something else."""
    made = write_known_model(folder, paints=paints)
    text = (made / "config.json").read_text()
    for name, value in config.items():
        text = re.sub(rf'"{name}": [^,]+', f'"{name}": {value}', text)
    (made / "config.json").write_text(text)
    registry.register("turning", None, made)


def move(registry: Registry, number: int) -> None:
    registry.client.set_registered_model_alias("turning", "production", str(number))


@pytest.fixture(scope="module")
def running(
    small_model: Path, registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("turning")
    version(registry, folder / "red", PAINTS)
    version(registry, folder / "blue", TURNED)
    version(registry, folder / "broken", PAINTS, ffn_dim="16")  # not what its weights are
    move(registry, 1)
    settings = ServeSettings(
        models=(str(small_model), MODEL), measured_capacity=False, max_sessions=2, min_editors=1,
        max_editors=2, downscale_delay_s=6.0, editor_cpus=0.5, front_cpus=0.25,
        on_new_version="move",
    )  # fmt: skip
    started = start(settings, port=free_port(), cpus=8, registry=registry.uri)
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


class Film:
    """A session that is fed the same picture, and the colour of each frame that comes back."""

    def __init__(self, running: Running) -> None:
        self.colours: list[str] = []
        self.model = ""
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._film(running.stream_url))

    async def _film(self, url: str) -> None:
        unlike = np.abs(expected_edit(FRAME[None], "red")[0].astype(int) - FRAME).any()
        assert unlike, "a picture that no edit changes tells no version"
        async with connect(
            url, "paint it red", width=96, height=64, fps=24, format="png",
            model="turning@production",
        ) as stream:  # fmt: skip
            assert stream.opened is not None
            self.model = stream.opened.model
            feeding = asyncio.create_task(self._feed(stream))
            async for frame in stream:
                assert frame.index == len(self.colours)
                self.colours.append(colour_of(frame.pixels))
            assert stream.reconnects == 0
            assert await feeding == len(self.colours)

    async def _feed(self, stream: Stream) -> int:
        sent = 0
        while not self._end.is_set():
            await stream.send(FRAME)
            sent += 1
            await asyncio.sleep(1 / 24)
        stream.finish()
        return sent

    async def end(self) -> list[str]:
        self._end.set()
        await self.task
        return self.colours


def colour_of(pixels: np.ndarray) -> str:
    """The one whose paint it has: "red" as version 1 has it, "blue" as version 2."""
    for colour in PAINTS:
        wanted = expected_edit(FRAME[None], colour)[0].astype(int)
        if np.abs(pixels - wanted).max() <= TOLERANCE:
            return colour
    return "none"


def versions(running: Running) -> list[str]:
    told = httpx.get(f"{running.url}/v1/models").json()["models"]
    return [model["name"] for model in told if model["model"] == "turning@production"]


async def test_an_alias_that_moves_rolls_the_model_under_a_running_session(
    running: Running, registry: Registry
) -> None:
    with pytest.raises(WireError, match="no model 'x' is served; choose small, turning@production"):
        async with connect(running.stream_url, "x", width=48, height=32, fps=16, model="x"):
            pass
    assert await asyncio.to_thread(versions, running) == ["turning version 1"]
    film = Film(running)
    await until(lambda: len(film.colours) > 20, 30)
    await asyncio.to_thread(move, registry, 2)
    await until(lambda: versions(running) == ["turning version 2"], 60)
    await until(lambda: film.colours[-1] == "blue", 20)
    late = Film(running)
    await until(lambda: len(late.colours) > 8, 20)
    assert (film.model, late.model) == ("turning version 1", "turning version 2")

    # A version that no editor can load takes nobody, and says so; back is the same move.
    await asyncio.to_thread(move, registry, 3)

    def notes() -> list[str]:
        told: list[str] = httpx.get(f"{running.url}/readyz").json().get("notes", [])
        return told

    failed = "turning version 3 takes no sessions: it could not be loaded"
    await until(lambda: failed in notes(), 60)
    assert await asyncio.to_thread(versions, running) == ["turning version 2"]
    metrics = (await asyncio.to_thread(httpx.get, f"{running.url}/metrics")).text
    assert 'liveedit_model_failed{model="turning version 3",process="hub"} 1.0' in metrics
    await asyncio.to_thread(move, registry, 1)
    await until(lambda: versions(running) == ["turning version 1"], 60)
    await until(lambda: film.colours[-1] == late.colours[-1] == "red", 20)

    colours = await film.end()
    turns = [n for n in range(1, len(colours)) if colours[n] != colours[n - 1]]
    assert [colours[n] for n in (0, *turns)] == ["red", "blue", "red"]
    assert all((n - 9) % 12 == 0 for n in turns), "not at a chunk's border"
    assert set((await late.end())[:9]) == {"blue"}
    assert running.folder is not None
    logs = (running.folder / "session_latest" / "logs" / "serve").glob("*front*.log")
    text = "".join(log.read_text() for log in logs)
    ended = "by turning version 1, turning version 2, turning version 1"
    assert re.search(rf"close after .* {ended}", text)
