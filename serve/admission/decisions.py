"""Placement and scaling: pure functions of what is known.

Nothing here waits, asks or reads a clock, so the same code runs in the server (`placement`), in
Serve's controller (`follow`) and on a simulated clock. Nothing heavy is imported: Serve pickles the
policy into its controller.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from serve.admission.admission import Editor, Request, admits, shares_at
from serve.admission.fleet import GRAIN, Fleet, grain


@dataclass(frozen=True)
class Need:
    """How many editors were needed at a moment."""

    at: float
    editors: int


@dataclass(frozen=True)
class Scale:
    """Bounds of the number of editors; equal ones switch scaling off."""

    min_editors: int
    max_editors: int
    spare_editors: int = 0
    delay_s: float = 600.0


# --- placement


def line(requests: Iterable[Request]) -> list[Request]:
    """The queue's order: who lost an editor first, then by arrival."""
    return sorted(requests, key=lambda request: not request.again)


def expected_s(place: int, sessions: int, session_s: float, starting_s: float | None) -> float:
    """Seconds until the one at `place` (from 1) gets an editor.

    A place becomes free when an editor that is being started is there, or when one of `sessions`
    ends, which last `session_s` on average.
    """
    leaving = session_s * place / max(1, sessions)
    return leaving if starting_s is None else min(leaving, starting_s)


# --- scaling


def packed(grains: Mapping[int, int], *, max_sessions: int, measured: bool) -> int:
    """Editors that would do for shares of so many grains, so many of each: the largest first, each
    into the fullest with room.

    Equal ones go together: ten thousand take a millisecond.
    """
    bins: Counter[tuple[int, int]] = Counter()  # editors by their grains and sessions
    open_: list[tuple[int, int]] = []  # those below `max_sessions`, in order
    for grains_each in sorted(grains, reverse=True):
        left = grains[grains_each]
        full_for = partial(_full, grains=grains_each, max_sessions=max_sessions, measured=measured)
        while left:
            at = bisect_left(open_, True, key=full_for)  # by load, so room comes before no room
            if at:
                before = open_[at - 1]
                number, many = min(left, bins[before]), 1
                bins[before] -= number
                if not bins[before]:
                    del open_[at - 1]
            else:  # new ones, each with as many as it takes
                before, many = (0, 0), 1
                while many < left and not full_for((many * grains_each, many)):
                    many += 1
                number = left // many
            after = before[0] + many * grains_each, before[1] + many
            if after[1] < max_sessions and not bins[after]:
                insort(open_, after)
            bins[after] += number
            left -= number * many
    return bins.total()


def _full(held: tuple[int, int], grains: int, max_sessions: int, measured: bool) -> bool:
    load, share = held[0] * GRAIN, grains * GRAIN
    return not admits(load, held[1], share, max_sessions=max_sessions, measured=measured)


def needed(fleet: Fleet, waiting: Sequence[Request], spare: int = 0) -> int:
    """Editors that are needed now: for what is open and for what waits or was just refused.

    What fits nowhere needs editors beyond those that are there, however sessions are spread; while
    nothing waits, as many as the sessions would fit in. Any editor can load any model.
    """
    if not len(fleet):
        return max(1, spare)
    one, grains, left = fleet.editors[0], fleet.grains, list[Request]()
    if waiting:
        able = _taught(fleet, waiting)
        left, one, grains = able.place_all(line(waiting)), able.editors[0], able.grains
    if left:
        grains = Counter(grain(shares_at(one, request)[0]) for request in left)
    more = packed(grains, max_sessions=one.max_sessions, measured=one.measured) + spare
    return len(fleet) + more if left else max(1, more)


def _taught(fleet: Fleet, waiting: Sequence[Request]) -> Fleet:
    """A copy in which every editor holds each model that one of them does or somebody waits for,
    and what is known of a model anywhere, its chunks and costs, is known of it there."""
    editors = fleet.editors
    asked = {request.sizes.model for request in waiting}
    having = editors[0].models
    if having is None or (
        asked <= having.keys() and all((e.models or {}).keys() == having.keys() for e in editors)
    ):
        return fleet.trial()
    models = {key: warm for e in editors for key, warm in (e.models or {}).items()}
    for key in asked - models.keys():
        models[key] = editors[0].warm(key)
    costs = {sizes: cost for e in editors for sizes, cost in e.costs.items()}
    taught = (replace(e, models=models, costs={**costs, **e.costs}, priced={}) for e in editors)
    return Fleet(taught, fleet.rank, together=fleet.together)


def wanted(history: Sequence[Need], need: Need, delay_s: float) -> tuple[list[Need], int]:
    """More at once, fewer only when they were too many for `delay_s`: the most of that time.

    Returns the history to hand in next time and the number of editors wanted.
    """
    recent = [n for n in history if n.at > need.at - delay_s and n.editors > need.editors]
    kept = [*recent, need]
    return kept, max(n.editors for n in kept)


def closing(editors: Sequence[Editor], number: int) -> frozenset[str]:
    """The `number` editors that are to become empty and go: the emptiest."""
    if number <= 0:
        return frozenset()
    order = heapq.nsmallest(number, editors, key=lambda e: (e.load, len(e.streams), e.name))
    return frozenset(editor.name for editor in order)


def follow(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy for editors (`ray.serve.config.AutoscalingPolicy`).

    Up: to the number that the hub wants, which every editor records as `wanted`. Down: only after
    an editor that was empty has left by itself, because Serve would stop the newest, empty or not.
    """
    newest = max(
        (points[-1] for points in context.raw_metrics.get("wanted", {}).values() if points),
        key=lambda point: point.timestamp,
        default=None,
    )
    if newest is None or newest.value < 1:  # nobody knows: as it is
        return context.target_num_replicas, {}
    return max(int(newest.value), context.current_num_replicas), {}
