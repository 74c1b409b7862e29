"""How many sessions an editor takes: by what a chunk costs here, measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modeling.editor import StreamingEditor
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.work import Opening

# Share of the accelerator's time that may be promised. Sessions complete their chunks when they
# like: four that needed 90 % of a GPU between them were late with a quarter of their chunks.
HEADROOM = 0.8


@dataclass(frozen=True)
class Load:
    """A session's share of the accelerator: seconds of compute a second of video."""

    share: float
    size: tuple[int, int]


class Capacity:
    """Sums the sessions' loads. The first session is always taken: alone it may be late, and a
    live one then drops frames, but nothing is gained by an accelerator that stands idle."""

    def __init__(self, *, chunk_frames: int, max_sessions: int, measured: bool = True) -> None:
        self.chunk_frames, self.max_sessions, self.measured = chunk_frames, max_sessions, measured
        self.loads: dict[str, Load] = {}
        self._costs: dict[tuple[int, int], float] = {}  # seconds a chunk, by (height, width)

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
        self._costs[settings.height, settings.width] = cost
        return cost

    def observe(self, size: tuple[int, int], seconds: float) -> None:
        """A chunk of this size took so long."""
        before = self._costs.get(size, seconds)
        self._costs[size] = 0.9 * before + 0.1 * seconds

    def cost(self, size: tuple[int, int]) -> float:
        """Seconds a chunk of (height, width); by area from the nearest known size when new."""
        if size in self._costs:
            return self._costs[size]
        if not self._costs:
            return 0.0
        area = size[0] * size[1]
        known = min(self._costs, key=lambda s: abs(s[0] * s[1] - area))
        return self._costs[known] * area / (known[0] * known[1])

    @property
    def load(self) -> float:
        return sum(load.share for load in self.loads.values())

    def admit(self, opening: Opening) -> None:
        """Counts the session in. Raises WireError `at_capacity` when it does not fit."""
        size = (opening.height, opening.width)
        share = self.cost(size) * opening.fps / self.chunk_frames
        full = len(self.loads) >= self.max_sessions
        if full or (self.measured and self.loads and self.load + share > HEADROOM):
            raise WireError(
                "at_capacity",
                f"{len(self.loads)} sessions use {self.load:.0%} of this editor and this one would "
                f"need {share:.0%}; try again later",
                RETRY_AFTER_S,
            )
        self.loads[opening.session] = Load(share, size)

    def release(self, session: str) -> None:
        self.loads.pop(session, None)
