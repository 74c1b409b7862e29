"""How many sessions an editor takes: by what a chunk costs here, measured."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from modeling.editor import StreamingEditor
from serve.scaling import decisions
from serve.scaling.decisions import Size
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.work import Opening

NEWEST = 0.1  # weight of the newest chunk in what is known of the cost


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
        self.costs: dict[Size, float] = {}  # seconds a chunk, by (height, width)
        self._names = itertools.count()

    def warm_up(self, editor: StreamingEditor) -> float:
        """Edits chunks of the model's own size; returns the seconds that one costs.

        The first that sees a full window pays for what is done once (kernel choice, graphs,
        allocation), the second still on a GPU, which counts a chunk's refresh with the next chunk.
        The third costs what all others will.
        """
        settings = editor.settings
        stream = editor.open("warm up", height=settings.height, width=settings.width)
        cost = 0.0
        for _ in range(settings.window_latents // settings.chunk_latents + 2):
            frames = np.zeros((stream.wanted_frames, settings.height, settings.width, 3), np.uint8)
            for chunk in stream.push(frames):
                cost = chunk.compute_ms / 1000
        self.costs[settings.height, settings.width] = cost
        return cost

    def observe(self, size: Size, seconds: float, name: str | None = None) -> None:
        """A chunk of this size, of stream `name`, took so long."""
        self.costs[size] = _moved(self.costs.get(size, seconds), seconds)
        if name in self.loads:
            self.loads[name].cost = _moved(self.loads[name].cost, seconds)

    def cost(self, size: Size) -> float:
        """Seconds a chunk of (height, width)."""
        return decisions.cost_of(self.costs, size)

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
        cost = self.cost((opening.height, opening.width))
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

    def release(self, name: str) -> None:
        self.loads.pop(name, None)


def _moved(before: float, seconds: float) -> float:
    return (1 - NEWEST) * before + NEWEST * seconds
