"""What the tests of an engine open it with, and the works of one session."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from modeling.editor import StreamingEditor
from serve.admission.admission import Sizes
from serve.editor.accelerator import Accelerator
from serve.editor.capacity import means_of
from serve.editor.engine import Engine
from serve.wire.work import Edited, EditorEvent, Frames, Opening, Work
from tests.known_editors import block_clip

RED, BLUE = "paint it red", "paint it blue"
SOURCE = block_clip(33, 32, 48)


OPENING = Opening("s", RED, 48, 32, 12.0, "lossless", seed=5)


SMALL = replace(OPENING, work_size="32x16", detail="source")


SIZES = Sizes((32, 48), (32, 48), "off")


def opening(name: str, size: tuple[int, int] = (128, 192), fps: float = 16.0) -> Opening:
    return Opening(name, "p", size[1], size[0], fps, "live")


def standalone(editor: StreamingEditor, *, max_sessions: int = 8, measured: bool = True) -> Engine:
    """On an accelerator of its own, which knows the model without a warm-up."""
    on = Accelerator(max_sessions=max_sessions, measured=measured, degrade=True)
    on.capacity.means, on.capacity.chunk_frames = means_of(editor), editor.settings.chunk_frames
    return Engine(editor, "", on)


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


@dataclass(frozen=True)
class Made(Edited):
    """And the frames, which go ahead of it."""

    frames: np.ndarray = field(kw_only=True)


async def together(stream: AsyncGenerator[EditorEvent]) -> AsyncIterator[Any]:
    """What comes, each chunk with its frames."""
    frames: np.ndarray | None = None
    async for event in stream:
        if isinstance(event, Frames):
            assert frames is None, "of a chunk before, which did not come"
            frames = event.frames
        elif isinstance(event, Edited):
            assert frames is not None, "a chunk without frames"
            yield Made(**vars(event), frames=frames)
            frames = None
        else:
            yield event


async def following(stream: AsyncGenerator[EditorEvent]) -> Any:
    """What comes next, a chunk with its frames."""
    return await anext(together(stream))


async def events(engine: Engine, opening: Opening, *works: Work) -> list[Any]:
    """All that comes, each chunk with its frames."""
    return [event async for event in together(engine.edit(opening, Source(*works).take))]


def replaced(**change: Any) -> Opening:
    return Opening(**{**vars(OPENING), **change})
