"""Sessions that stream at a camera's pace, and what became of each frame."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serve.client import connect
from serve.wire.protocol import Mode
from tests.serve.conftest import clip

FPS = 8.0
READY_S = 120.0  # for editors to be there again
STARTED = 24  # edited frames after which a session is under way


@dataclass
class Session:
    """Edited frames in the order in which they came, and when (`time.monotonic()`)."""

    mode: Mode
    frames: int  # of the source
    got: list[tuple[int, float]] = field(default_factory=list)
    sent: int = 0  # a camera's are left out while the connection is lost
    reconnects: int = 0

    @property
    def indices(self) -> list[int]:
        return [index for index, _ in self.got]

    def pause(self, since: float) -> float:
        """The longest time between two frames after `since`, seconds."""
        came = [since, *(at for _, at in self.got if at > since)]
        return max(b - a for a, b in itertools.pairwise(came))

    async def run(self, url: str, seed: int) -> None:
        async with connect(
            url, "make it red", width=48, height=32, fps=FPS, mode=self.mode, seed=seed,
            on_queue=lambda place: None,
        ) as stream:  # fmt: skip

            async def send() -> None:
                for frame in clip(self.frames):
                    self.sent += await stream.send(frame) is not None
                    await asyncio.sleep(1 / FPS)
                stream.finish()

            sending = asyncio.create_task(send())
            async for edited in stream:
                self.got.append((edited.index, edited.came))
            await sending
            self.reconnects = stream.reconnects


class Streams:
    """Sessions that run side by side; `begun` returns when all are under way."""

    def __init__(self, url: str, *modes: Mode, frames: int) -> None:
        self.sessions = [Session(mode, frames) for mode in modes]
        self._running = [
            asyncio.ensure_future(session.run(url, seed))
            for seed, session in enumerate(self.sessions)
        ]

    async def begun(self) -> None:
        async with asyncio.timeout(READY_S):
            while not all(len(session.got) >= STARTED for session in self.sessions):
                await asyncio.sleep(0.1)
                for running in self._running:
                    if running.done():
                        running.result()

    async def end(self) -> list[Session]:
        await asyncio.gather(*self._running)
        return self.sessions


async def metrics(http: str) -> dict[tuple[str, str], float]:
    """By name, without the prefix, and process; sums over all other labels."""
    async with httpx.AsyncClient(timeout=30) as client:
        text = (await client.get(f"{http}/metrics")).text
    values: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name.removeprefix("liveedit_"), sample.labels.get("process", "")
            values[key] = values.get(key, 0.0) + sample.value
    return values


async def editors_ready(http: str, count: int) -> float:
    """Returns how many seconds it took."""
    began = time.monotonic()
    async with asyncio.timeout(READY_S):
        while (await metrics(http)).get(("editors_ready", "hub")) != count:
            await asyncio.sleep(0.2)
    return time.monotonic() - began
