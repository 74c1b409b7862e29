"""Whether frames come at a constant rate, told from their times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MAX_FPS = 1000
COMMON = [Fraction(n) for n in (24, 25, 30, 50, 60, 12, 15, 16, 48, 100, 120, 240)] + [
    Fraction(1000 * n, 1001) for n in (24, 30, 48, 60, 120, 240)
]
MAX_GRID_FPS = 300  # beyond it a rate is a time base, on which everything fits
ROUNDING = 0.2  # of a frame: how far time stamps may be rounded off a rate
LEFT_OUT = 0.1  # of a rate's frames; with more of them missing the rate is called variable


@dataclass(frozen=True)
class Rate:
    """When frames are shown."""

    fps: Fraction  # of the grid that they lie on, else the mean
    grid: bool  # whether every frame lies on a multiple of 1/fps
    constant: bool  # whether hardly a place of the grid is left out
    bulk: Fraction  # of most frames


def find_rate(times: np.ndarray, stated: Iterable[Fraction | None], tick: Fraction) -> Rate | None:
    """The rate of frames at `times` (seconds, float [n], sorted).

    Args:
        stated: Rates that the container gives, best first.
        tick: What the container rounds times to, in seconds.

    Returns None when neither times nor container say anything of a rate.
    """
    given = [Fraction(rate) for rate in stated if rate and 0 < rate <= MAX_FPS]
    if len(times) < 2 or times[-1] <= times[0]:
        return Rate(_neat(given[0]), True, True, _neat(given[0])) if given else None
    usual = 1 / float(np.median(np.diff(times))) if np.median(np.diff(times)) > 0 else 0.0
    mean = (len(times) - 1) / float(times[-1] - times[0])
    near = [
        rate
        for rate in [*COMMON, *(Fraction(round(r)) for r in (usual, mean) if r >= 1)]
        if any(abs(float(rate) / r - 1) < 0.05 for r in (usual, mean) if r)
    ]
    for fps in [*given, *near]:
        if fps <= MAX_GRID_FPS and (places := _places(times, fps, tick)) is not None:
            missing = 1 - len(places) / float(places[-1] + 1)
            return Rate(_neat(fps), True, missing <= LEFT_OUT, _neat(fps))
    bulk = min(usual or mean, MAX_FPS)
    return Rate(_neat(Fraction(min(mean, MAX_FPS))), False, False, _neat(Fraction(bulk)))


def _places(times: np.ndarray, fps: Fraction, tick: Fraction) -> np.ndarray | None:
    """Which multiple of 1/fps each time is; None when they are none."""
    exact = (times - times[0]) * float(fps)
    off = exact - np.round(exact)
    exact = exact - np.median(off)
    places = np.round(exact)
    allowed = min(ROUNDING, max(0.02, float(tick * fps)))
    if np.abs(exact - places).max() > allowed or (np.diff(places) < 1).any():
        return None
    return places - places[0]


def _neat(fps: Fraction) -> Fraction:
    return fps.limit_denominator(100_000)
