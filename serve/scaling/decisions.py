"""Admission, placement and scaling: pure functions of what is known.

Nothing here waits, asks or reads a clock, so the same code runs in the server (`placement`,
`serve.editor.capacity`), in Serve's controller (`follow`) and on a simulated clock. Nothing heavy
is imported: Serve pickles the policy into its controller.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from serve.scaling.rungs import Means, Rung, Size, rungs, slowed

# Share of the accelerator's time that may be promised. Sessions complete their chunks when they
# like: four that needed 90 % of a GPU between them were late with a quarter of their chunks.
HEADROOM = 0.8


@dataclass(frozen=True)
class Sizes:
    """What a chunk's cost depends on: the networks see `work`, what comes and goes is `frame`."""

    frame: Size
    work: Size
    detail: str = "source"  # or "off", which saves a decoding
    sparing: bool = False  # as a `Rung` has them
    halved: bool = False
    model: str = ""  # key of the version that edits

    def at(self, rung: Rung) -> Sizes:
        return replace(self, work=rung.work, sparing=rung.sparing, halved=rung.halved)


Shape = tuple[Sizes, float, bool]


@dataclass(frozen=True)
class Request:
    """What an open asks for. `epoch` tells an older stream of the same session from a newer."""

    stream: str
    session: str
    sizes: Sizes
    fps: float
    epoch: int = 0
    waits: bool = False  # its client understands `queued`
    again: bool = False  # a session that lost its editor: it goes before new ones
    live: bool = True  # under pressure a lossless one waits
    name: str = ""  # of the model that was chosen; its version is in `sizes`

    @property
    def shape(self) -> Shape:
        """All that matters to whether there is room for it."""
        return self.sizes, self.fps, self.live


@dataclass(frozen=True)
class Stream:
    """A session at an editor: its `share` edited as it asked, and the `least` it can do with."""

    session: str
    share: float
    least: float | None = None  # None: no less
    model: str = ""  # key of the version that edits it


@dataclass(frozen=True)
class Warm:
    """A version that an editor holds. `means` are those to edit sessions less well; None: none."""

    chunk_frames: int
    means: Means | None = None


@dataclass(frozen=True)
class Editor:
    """What is known of one editor. `costs` are seconds a chunk, of which `frame_s` for every pixel
    of a frame are spent outside of the networks. `models` are the frames of a chunk by the key of
    every version that it holds, `chunk_frames` of any other; None is whatever is asked
    for."""

    name: str
    chunk_frames: int
    max_sessions: int
    streams: Mapping[str, Stream] = field(default_factory=dict)
    costs: Mapping[Sizes, float] = field(default_factory=dict)
    measured: bool = True  # shares count, not only sessions
    frame_s: float = 0.0
    means: Means | None = None  # to edit sessions less well; None: it does not
    models: Mapping[str, Warm] | None = None
    loading: str = ""  # key of a version that it will hold

    def warm(self, model: str) -> Warm:
        """What holds for sessions with this model, also before it is here."""
        other = Warm(self.chunk_frames, self.means)
        return other if self.models is None else self.models.get(model, other)

    def holds(self, model: str) -> bool:
        return self.models is None or model in self.models

    def uses(self, model: str) -> bool:
        """Whether a session there is edited by it."""
        return any(stream.model == model for stream in self.streams.values())

    @cached_property
    def load(self) -> float:
        """With everybody edited as asked, which above 1 it cannot do."""
        return sum(stream.share for stream in self.streams.values())

    @cached_property
    def sessions(self) -> frozenset[str]:
        return frozenset(stream.session for stream in self.streams.values())


@dataclass(frozen=True)
class Need:
    """How many editors were needed at a moment."""

    at: float
    editors: int


# --- admission


def cost_of(costs: Mapping[Sizes, float], sizes: Sizes, frame_s: float = 0.0) -> float:
    """Seconds a chunk. Unknown sizes are guessed from those that are worked at the most alike: the
    networks' part by the area that they see, the rest by the frame's. 0 when nothing is known."""
    if sizes in costs:
        return costs[sizes]
    if not costs:
        return 0.0
    work, frame = _area(sizes.work), _area(sizes.frame)
    known = min(
        costs,
        key=lambda s: (
            s.model != sizes.model, s.detail != sizes.detail,
            s.sparing != sizes.sparing, s.halved != sizes.halved,
            abs(_area(s.work) - work), abs(_area(s.frame) - frame),
        ),
    )  # fmt: skip
    networks = max(0.0, costs[known] - frame_s * _area(known.frame))
    return networks * work / _area(known.work) + frame_s * frame


def _area(size: Size) -> int:
    return size[0] * size[1]


def share_of(cost: float, fps: float, chunk_frames: int) -> float:
    return cost * fps / chunk_frames


def admits(load: float, sessions: int, share: float, *, max_sessions: int, measured: bool) -> bool:
    """Whether an editor that has so many sessions, of this load, takes another.

    The first is always taken: alone it may be late, and a live one then drops frames, but nothing
    is gained by an accelerator that stands idle.
    """
    if sessions >= max_sessions:
        return False
    return not sessions or not measured or load + share <= HEADROOM


def share_at(editor: Editor, request: Request) -> float:
    """Of the editor's accelerator, that the stream would take."""
    cost = cost_of(editor.costs, request.sizes, editor.frame_s)
    return share_of(cost, request.fps, editor.warm(request.sizes.model).chunk_frames)


def least_at(editor: Editor, request: Request) -> float:
    """The share that the stream would have at the bottom of its ladder."""
    share, sizes = share_at(editor, request), request.sizes
    means = editor.warm(sizes.model).means
    if means is None:
        return share
    cost = cost_of(editor.costs, sizes, editor.frame_s)
    if not request.live:
        return slowed(share, cost)
    return min(
        share_at(editor, replace(request, sizes=sizes.at(rung)))
        for rung in rungs(means, sizes.frame, sizes.work, live=True)
    )


def has_room(editor: Editor, request: Request) -> bool:
    """Also where a live one finds it only when sessions are edited less well (`ladder`).

    An older stream of the same session makes room for the newer: it is its ghost.
    """
    if not editor.holds(request.sizes.model):
        return False
    ghost = request.session in editor.sessions
    others = [s for s in editor.streams.values() if s.session != request.session] if ghost else []
    load = sum(s.share for s in others) if ghost else editor.load
    sessions = len(others) if ghost else len(editor.streams)
    admitted = partial(
        admits, sessions=sessions, max_sessions=editor.max_sessions, measured=editor.measured
    )
    if admitted(load, share=share_at(editor, request)):
        return True
    if editor.warm(request.sizes.model).means is None or not request.live:
        return False
    streams = others if ghost else editor.streams.values()
    load = sum(s.share if s.least is None else s.least for s in streams)
    return admitted(load, share=least_at(editor, request))


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
    refused: set[Shape] = set()  # fits nowhere, and loads only grow
    for request in requests:
        known = request.session in held
        shape = request.shape
        if shape in refused and not known:
            left.append(request)
            continue
        at = next((n for n, (*_, e) in enumerate(ranked) if has_room(e, request)), None)
        if at is None:
            left.append(request)
            refused.add(shape)
            continue
        after = with_stream(ranked.pop(at)[-1], request)
        insort(ranked, entry(after))
        held.add(request.session)
        if known:  # its ghost may have been dearer
            refused.clear()
    return [editor for *_, editor in ranked], left


def with_stream(editor: Editor, request: Request) -> Editor:
    """The editor as it will be when it has this stream."""
    new = Stream(
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
