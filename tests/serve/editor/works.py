"""What the tests of an engine open it with, and the works of one session."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from serve.admission.admission import Sizes
from serve.editor.engine import Engine
from serve.wire.work import EditorEvent, Frames, Opening, Work
from tests.known_editors import block_clip

RED, BLUE = "paint it red", "paint it blue"
SOURCE = block_clip(33, 32, 48)


OPENING = Opening("s", RED, 48, 32, 12.0, "lossless", seed=5)


SMALL = replace(OPENING, work_size="32x16", detail="source")


SIZES = Sizes((32, 48), (32, 48), "off")


class Source:
    """Gives out works, then waits for ever."""

    def __init__(self, *works: Work) -> None:
        self.works = deque(works)

    async def take(self) -> Work:
        if not self.works:
            await asyncio.Event().wait()
        return self.works.popleft()


def work(number: int, first: int, count: int, prompt: str = RED, **flags: bool) -> Work:
    flags = {"last": False, **flags}
    return Work(number, prompt, SOURCE[first : first + count], **flags)


WORKS = (
    work(0, 0, 9),
    work(1, 9, 4, more=True),
    work(1, 13, 8, BLUE),
    work(2, 21, 4, BLUE, more=True),
    work(2, 25, 4, BLUE, more=True),
    work(2, 29, 4, BLUE, last=True),
)


def chunks(count: int) -> list[Work]:
    """As many works of a chunk each, of the same frames."""
    return [Work(n, RED, SOURCE[: 12 if n else 9], n == count - 1) for n in range(count)]


def filling(engine: Engine) -> int:
    """Chunks of a stream that say nothing of what later ones cost."""
    settings = engine.editor.settings
    return settings.window_latents // settings.chunk_latents + 1


async def following(stream: AsyncGenerator[EditorEvent]) -> EditorEvent:
    """What comes next, but for frames that go ahead of their chunk."""
    while isinstance(event := await anext(stream), Frames):
        pass
    return event


async def events(engine: Engine, opening: Opening, *works: Work) -> list[Any]:
    """Without the frames that go ahead of their chunk."""
    found = [event async for event in engine.edit(opening, Source(*works).take)]
    return [event for event in found if not isinstance(event, Frames)]


def replaced(**change: Any) -> Opening:
    return Opening(**{**vars(OPENING), **change})
