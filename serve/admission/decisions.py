"""Placement and scaling: pure functions of what is known.

Nothing here waits, asks or reads a clock, so the same code runs in the server (`placement`), in
Serve's controller (`follow`) and on a simulated clock. Nothing heavy is imported: Serve pickles the
policy into its controller.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from serve.admission.admission import (
    Demand,
    Editor,
    Request,
    Seat,
    admits,
    has_room,
    least_at,
    share_at,
)


@dataclass(frozen=True)
class Scale:
    """Bounds of the number of editors; equal ones switch scaling off."""

    min_editors: int = 1
    max_editors: int = 1
    spare_editors: int = 0
    delay_s: float = 600.0


@dataclass(frozen=True)
class Need:
    """How many editors were needed at a moment."""

    at: float
    editors: int


# --- placement


Rank = Callable[[Editor], tuple[Any, ...]]


def emptiest(editor: Editor) -> tuple[Any, ...]:
    """The order in which editors are tried; the simulation knows others, which lost."""
    return editor.load, len(editor.streams), editor.name


def place(
    editors: Sequence[Editor],
    request: Request,
    avoid: frozenset[str] = frozenset(),
    rank: Rank = emptiest,
) -> Editor | None:
    """The emptiest editor with room; one of `avoid` only where no other has any."""

    def order(editor: Editor) -> tuple[Any, ...]:
        return editor.name in avoid, *rank(editor)

    first = min(editors, key=order, default=None)
    if first is None or has_room(first, request):  # unless sizes, costs or models differ
        return first
    return min((e for e in editors if has_room(e, request)), key=order, default=None)


def place_all(
    editors: Sequence[Editor],
    requests: Iterable[Request],
    avoid: frozenset[str] = frozenset(),
    rank: Rank = emptiest,
) -> tuple[list[Editor], list[Request]]:
    """`place` for one after another: the editors as they are then, and who found no room.

    Editors are kept in order, so that a thousand of them and a long queue take milliseconds.
    """

    def entry(editor: Editor) -> tuple[Any, ...]:
        return editor.name in avoid, *rank(editor), editor.name, editor

    ranked = sorted(map(entry, editors))  # names differ, so editors are never compared
    left: list[Request] = []
    held = {session for editor in editors for session in editor.sessions}
    refused: set[Demand] = set()  # fits nowhere, and loads only grow
    for request in requests:
        known = request.session in held
        demand = request.demand
        if demand in refused and not known:
            left.append(request)
            continue
        at = next((n for n, (*_, e) in enumerate(ranked) if has_room(e, request)), None)
        if at is None:
            left.append(request)
            refused.add(demand)
            continue
        after = with_stream(ranked.pop(at)[-1], request)
        insort(ranked, entry(after))
        held.add(request.session)
        if known:  # its ghost may have been dearer
            refused.clear()
    return [editor for *_, editor in ranked], left


def with_stream(editor: Editor, request: Request) -> Editor:
    """The editor as it will be when it has this stream."""
    new = Seat(
        request.session, share_at(editor, request), least_at(editor, request), request.sizes.model
    )
    kept = {n: s for n, s in editor.streams.items() if s.session != request.session}
    return replace(editor, streams={**kept, request.stream: new})


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


def packed(shares: Iterable[float], *, max_sessions: int, measured: bool) -> int:
    """Editors that would do for these shares: largest first, each into the fullest with room."""
    open_: list[tuple[float, int]] = []  # load and sessions of those below `max_sessions`, in order
    closed = 0
    for share in sorted(shares, reverse=True):
        full_for = partial(_full, share=share, max_sessions=max_sessions, measured=measured)
        at = bisect_left(open_, True, key=full_for)  # by load, so room comes before no room
        load, sessions = open_.pop(at - 1) if at else (0.0, 0)
        if sessions + 1 < max_sessions:
            insort(open_, (load + share, sessions + 1))
        else:
            closed += 1
    return closed + len(open_)


def _full(held: tuple[float, int], share: float, max_sessions: int, measured: bool) -> bool:
    return not admits(*held, share, max_sessions=max_sessions, measured=measured)


def needed(editors: Sequence[Editor], waiting: Sequence[Request], spare: int = 0) -> int:
    """Editors that are needed now: for what is open and for what waits or was just refused.

    What fits nowhere needs editors beyond those that are there, however sessions are spread; while
    nothing waits, as many as the sessions would fit in. Any editor can load any model.
    """
    if not editors:
        return max(1, spare)
    editors = [replace(e, models=None) if e.models is not None else e for e in editors]
    state, left = place_all(editors, line(waiting))
    one = editors[0]
    if left:
        shares = [share_at(one, request) for request in left]
    else:
        shares = [stream.share for editor in state for stream in editor.streams.values()]
    more = packed(shares, max_sessions=one.max_sessions, measured=one.measured) + spare
    return len(editors) + more if left else max(1, more)


def wanted(history: Sequence[Need], need: Need, delay_s: float) -> tuple[list[Need], int]:
    """More at once, fewer only when they were too many for `delay_s`: the most of that time.

    Returns the history to hand in next time and the number of editors wanted.
    """
    recent = [n for n in history if n.at > need.at - delay_s and n.editors > need.editors]
    kept = [*recent, need]
    return kept, max(n.editors for n in kept)


def closing(editors: Sequence[Editor], number: int) -> frozenset[str]:
    """The `number` editors that are to become empty and go: the emptiest."""
    order = sorted(editors, key=lambda e: (bool(e.streams), e.load, len(e.streams), e.name))
    return frozenset(editor.name for editor in order[: max(0, number)])


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
