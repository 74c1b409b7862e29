"""How many sessions an editor takes: by what a chunk costs here, measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from modeling.detail.work_size import in_words
from modeling.editor import StreamingEditor
from modeling.streaming.device import DeviceClock, to_device, to_host
from serve.scaling import decisions
from serve.scaling.decisions import Editor, Size, Sizes, Stream
from serve.wire.protocol import RETRY_AFTER_S, Detail, WireError
from serve.wire.work import Opening
from serve.work_sizes import sizes_of

NEWEST = 0.1  # weight of the newest chunk in what is known of the cost
KNOWN = 64  # sizes whose cost is remembered: clients choose them
SHOWN_AT = 2  # times the model's own sides: frames whose showing is measured


@dataclass
class Load:
    """A stream's part in the accelerator. `cost` is what its own chunks took, in seconds."""

    opening: Opening
    cost: float


class Capacity:
    """Sums the streams' shares, which follow what their chunks cost while they run."""

    def __init__(self, *, chunk_frames: int, max_sessions: int, measured: bool = True) -> None:
        self.chunk_frames, self.max_sessions, self.measured = chunk_frames, max_sessions, measured
        self.loads: dict[str, Load] = {}  # by a name of the stream's own, not its session's
        self.costs: dict[Sizes, float] = {}  # seconds a chunk
        self.frame_s = 0.0  # of them for every pixel of a frame, outside of the networks
        self._names = itertools.count()

    def warm_up(
        self,
        editor: StreamingEditor,
        sizes: Iterable[Sizes] = (),
        tell: Callable[[str], None] = lambda doing: None,
    ) -> float:
        """Edits chunks of the model's own size, and of `sizes`; returns the seconds that one of the
        former costs. `tell` hears what is done.
        """
        own = native(editor)
        for each in dict.fromkeys([own, *sizes]):
            tell(f"warming {in_words(each.frame)} at {in_words(each.work)}")
            self.costs[each] = _chunk_seconds(editor, each)
        tell("measuring capacity")
        self.frame_s = _frame_seconds(editor)
        return self.costs[own]

    def observe(self, sizes: Sizes, seconds: float, name: str | None = None) -> None:
        """A chunk of these sizes, of stream `name`, took so long."""
        # At the end, so that what is forgotten was not met for longest.
        self.costs[sizes] = _moved(self.costs.pop(sizes, seconds), seconds)
        if len(self.costs) > KNOWN:
            del self.costs[next(iter(self.costs))]
        if name in self.loads:
            self.loads[name].cost = _moved(self.loads[name].cost, seconds)

    def cost(self, sizes: Sizes) -> float:
        """Seconds a chunk."""
        return decisions.cost_of(self.costs, sizes, self.frame_s)

    def share(self, name: str) -> float:
        load = self.loads[name]
        return decisions.share_of(load.cost, load.opening.fps, self.chunk_frames)

    @property
    def load(self) -> float:
        return sum(self.share(name) for name in self.loads)

    def admit(self, opening: Opening) -> str:
        """Counts the stream in; returns the name to release it by.

        Raises WireError `at_capacity` when it does not fit.
        """
        cost = self.cost(sizes_of(opening))
        share = decisions.share_of(cost, opening.fps, self.chunk_frames)
        if not decisions.admits(
            self.load,
            len(self.loads),
            share,
            max_sessions=self.max_sessions,
            measured=self.measured,
        ):
            raise WireError(
                "at_capacity",
                f"{len(self.loads)} sessions use {self.load:.0%} of this editor and this one would "
                f"need {share:.0%}; try again later",
                RETRY_AFTER_S,
            )
        name = opening.stream or f"{opening.session}-{next(self._names)}"
        self.loads[name] = Load(opening, cost)
        return name

    def known(self, name: str) -> Editor:
        """What placement knows of this editor, called `name` there."""
        streams = {
            stream: Stream(load.opening.session, self.share(stream))
            for stream, load in self.loads.items()
        }
        return Editor(
            name,
            self.chunk_frames,
            self.max_sessions,
            streams,
            dict(self.costs),
            self.measured,
            self.frame_s,
        )

    def release(self, name: str) -> None:
        self.loads.pop(name, None)


def native(editor: StreamingEditor) -> Sizes:
    """Frames of the size that the model was trained at, edited as they are."""
    own: Size = (editor.settings.height, editor.settings.width)
    return Sizes(own, own)


def _chunk_seconds(editor: StreamingEditor, sizes: Sizes) -> float:
    """What a chunk costs when its window is full.

    The first that sees a full window pays for what is done once (kernel choice, graphs,
    allocation), the second still on a GPU, which counts a chunk's refresh with the next chunk.
    The third costs what all others will.
    """
    settings, (height, width) = editor.settings, sizes.frame
    detail: Detail = "source" if sizes.detail == "source" else "off"
    stream = editor.open(
        "warm up", height=height, width=width, work_size=in_words(sizes.work), detail=detail
    )
    cost = 0.0
    for _ in range(settings.window_latents // settings.chunk_latents + 2):
        frames = np.zeros((stream.wanted_frames, height, width, 3), np.uint8)
        for chunk in stream.push(frames):
            cost = chunk.compute_ms / 1000
    return cost


@torch.no_grad()
def _frame_seconds(editor: StreamingEditor) -> float:
    """Seconds a chunk and pixel of a frame that a stream spends outside of its networks, where it
    works at another size: making frames small, and their edit large again. The second time counts.
    """
    settings, clock = editor.settings, DeviceClock(editor.device)
    height, width = SHOWN_AT * settings.height, SHOWN_AT * settings.width
    frames = torch.zeros(settings.chunk_frames, height, width, 3, dtype=torch.uint8)
    for _ in range(2):
        began = clock.mark()
        large = to_device(frames, editor.device)
        small = editor.resize(large, settings.height, settings.width, "bicubic")
        to_host(editor.transfer(large, small, small))
        done = clock.mark()
        clock.wait(done)
    return clock.between(began, done) / 1000 / (height * width)


def _moved(before: float, seconds: float) -> float:
    return (1 - NEWEST) * before + NEWEST * seconds
