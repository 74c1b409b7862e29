"""How well a session can be edited, best first: what its model allows of the degrade ladder.

A live session has the rungs `full`, `mask` (a smaller budget of the mask cache), `size` (working
sizes that the model was trained at, the largest first) and `steps` (half of them); each has what
those before it have. A lossless one is never edited less well: it is `slowed` instead, which the
order of an editor's jobs does by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from modeling.detail.work_size import work_size

FULL = "full"  # as the client asked
NAMES = (FULL, "slowed", "mask", "size", "steps")
LOSSLESS_PATIENCE = 5.0  # seconds after which a lossless chunk is due like a live one
FEWEST_STEPS = 4  # of a model that may go without half of them

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Means:
    """What a model allows: sizes (height, width) it was trained at, its steps, a mask cache."""

    trained: tuple[Size, ...] = ()
    steps: int = 1
    masked: bool = False


@dataclass(frozen=True)
class Rung:
    name: str
    work: Size
    sparing: bool = False  # a smaller budget of the mask cache
    halved: bool = False  # every second step


@lru_cache(maxsize=256)
def rungs(means: Means, frame: Size, work: Size, *, live: bool) -> tuple[Rung, ...]:
    """Of a session with frames of this size whose client was promised working size `work`."""
    found = [Rung(FULL, work)]
    if not live:
        return (*found, Rung("slowed", work))
    if means.masked:
        found.append(Rung("mask", work, sparing=True))
    fitting = {work_size("native", *frame, trained) for trained in means.trained}
    for smaller in sorted(fitting, key=_area, reverse=True):
        if _area(smaller) < _area(work):
            found.append(replace(found[-1], name="size", work=smaller))
    if means.steps >= FEWEST_STEPS:
        found.append(replace(found[-1], name="steps", halved=True))
    return tuple(found)


def slowed(share: float, cost: float) -> float:
    """Of a lossless session with chunks of so many seconds, when all others go first."""
    return min(share, cost / LOSSLESS_PATIENCE)


def _area(size: Size) -> int:
    return size[0] * size[1]
