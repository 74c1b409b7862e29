"""Admission, placement and scaling: pure functions of what is known.

Nothing here waits, asks or reads a clock, so the same code runs in the server (`placement`,
`serve.editor.capacity`), in Serve's controller (`follow`) and on a simulated clock. Only the
standard library is used: Serve pickles the policy into its controller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Share of the accelerator's time that may be promised. Sessions complete their chunks when they
# like: four that needed 90 % of a GPU between them were late with a quarter of their chunks.
HEADROOM = 0.8

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Request:
    """What an open asks for. `epoch` tells an older stream of the same session from a newer."""

    stream: str
    session: str
    size: Size
    fps: float
    epoch: int = 0
    waits: bool = False  # its client understands `queued`
    again: bool = False  # a session that lost its editor: it goes before new ones


@dataclass(frozen=True)
class Stream:
    """A session at an editor."""

    session: str
    share: float


@dataclass(frozen=True)
class Editor:
    """What is known of one editor. `costs` are seconds a chunk by size."""

    name: str
    chunk_frames: int
    max_sessions: int
    streams: Mapping[str, Stream] = field(default_factory=dict)
    costs: Mapping[Size, float] = field(default_factory=dict)
    measured: bool = True  # shares count, not only sessions

    @property
    def load(self) -> float:
        return sum(stream.share for stream in self.streams.values())


@dataclass(frozen=True)
class Need:
    """How many editors were needed at a moment."""

    at: float
    editors: int


# --- admission


def cost_of(costs: Mapping[Size, float], size: Size) -> float:
    """Seconds a chunk; by area from the nearest known size when new, 0 when nothing is known."""
    if size in costs:
        return costs[size]
    if not costs:
        return 0.0
    area = size[0] * size[1]
    known = min(costs, key=lambda s: abs(s[0] * s[1] - area))
    return costs[known] * area / (known[0] * known[1])


def share_of(cost: float, fps: float, chunk_frames: int) -> float:
    return cost * fps / chunk_frames


def admits(shares: Iterable[float], share: float, *, max_sessions: int, measured: bool) -> bool:
    """Whether an editor that has these shares takes another.

    The first is always taken: alone it may be late, and a live one then drops frames, but nothing
    is gained by an accelerator that stands idle.
    """
    shares = list(shares)
    if len(shares) >= max_sessions:
        return False
    return not shares or not measured or sum(shares) + share <= HEADROOM


def has_room(editor: Editor, request: Request) -> bool:
    """An older stream of the same session makes room for the newer: it is its ghost."""
    others = [s.share for s in editor.streams.values() if s.session != request.session]
    share = share_of(cost_of(editor.costs, request.size), request.fps, editor.chunk_frames)
    return admits(others, share, max_sessions=editor.max_sessions, measured=editor.measured)


# --- placement


def place(
    editors: Sequence[Editor], request: Request, avoid: frozenset[str] = frozenset()
) -> Editor | None:
    """The emptiest editor with room; one of `avoid` only where no other has any."""
    open_ = [editor for editor in editors if has_room(editor, request)]
    if not open_:
        return None
    return min(open_, key=lambda e: (e.name in avoid, e.load, len(e.streams), e.name))


def with_stream(editor: Editor, request: Request) -> Editor:
    """The editor as it will be when it has this stream."""
    share = share_of(cost_of(editor.costs, request.size), request.fps, editor.chunk_frames)
    kept = {n: s for n, s in editor.streams.items() if s.session != request.session}
    return replace(editor, streams={**kept, request.stream: Stream(request.session, share)})


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
    """Editors that would do for these shares: first fit, largest first."""
    bins: list[list[float]] = []
    for share in sorted(shares, reverse=True):
        for held in bins:
            if admits(held, share, max_sessions=max_sessions, measured=measured):
                held.append(share)
                break
        else:
            bins.append([share])
    return len(bins)


def needed(editors: Sequence[Editor], waiting: Sequence[Request], spare: int = 0) -> int:
    """Editors that are needed now: for what is open and for what waits or was just refused.

    What fits nowhere needs editors beyond those that are there, however sessions are spread; while
    nothing waits, as many as the sessions would fit in.
    """
    if not editors:
        return max(1, spare)
    state, left = list(editors), []
    for request in line(waiting):
        found = place(state, request)
        if found is None:
            left.append(request)
        else:
            state[state.index(found)] = with_stream(found, request)
    one = editors[0]
    if left:
        shares = [share_of(cost_of(one.costs, r.size), r.fps, one.chunk_frames) for r in left]
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
