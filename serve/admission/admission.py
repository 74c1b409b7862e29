"""Admission: what a chunk costs, what share of an editor that is, and whether there is room for it.

Pure functions of what is known, as in `decisions`: an editor and the hub ask them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from serve.admission.rungs import Means, Rung, Size, rungs, slowed

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


Demand = tuple[Sizes, float, bool]


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
    avoid: frozenset[str] = frozenset()  # editors that its front could not reach of late

    @cached_property
    def demand(self) -> Demand:
        """All that matters to whether there is room for it."""
        return self.sizes, self.fps, self.live


@dataclass(frozen=True)
class Seat:
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
    streams: Mapping[str, Seat] = field(default_factory=dict)
    costs: Mapping[Sizes, float] = field(default_factory=dict)
    measured: bool = True  # shares count, not only sessions
    frame_s: float = 0.0
    means: Means | None = None  # to edit sessions less well; None: it does not
    models: Mapping[str, Warm] | None = None
    loading: str = ""  # key of a version that it will hold
    # What shapes take here, worked out once; goes on with whoever has the same costs and models.
    priced: dict[Demand, tuple[float, float]] = field(
        default_factory=dict, compare=False, repr=False
    )

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
    def least(self) -> float:
        """With everybody at the bottom of the ladder."""
        streams = self.streams.values()
        return sum(s.share if s.least is None else s.least for s in streams)

    @cached_property
    def sessions(self) -> frozenset[str]:
        return frozenset(stream.session for stream in self.streams.values())


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


def shares_at(editor: Editor, request: Request) -> tuple[float, float]:
    """Of the editor's accelerator, that the stream would take, and at the bottom of its ladder."""
    found = editor.priced.get(request.demand)
    if found is None:
        found = editor.priced[request.demand] = _priced(editor, request)
    return found


def _priced(editor: Editor, request: Request) -> tuple[float, float]:
    sizes, warm = request.sizes, editor.warm(request.sizes.model)
    cost = cost_of(editor.costs, sizes, editor.frame_s)
    share = share_of(cost, request.fps, warm.chunk_frames)
    if warm.means is None:
        return share, share
    if not request.live:
        return share, slowed(share, cost)
    costs = (
        cost_of(editor.costs, sizes.at(rung), editor.frame_s)
        for rung in rungs(warm.means, sizes.frame, sizes.work, live=True)
    )
    return share, min(share_of(cost, request.fps, warm.chunk_frames) for cost in costs)


def with_stream(editor: Editor, request: Request) -> Editor:
    """The editor as it will be when it has this stream."""
    share, least = shares_at(editor, request)
    new = Seat(request.session, share, least, request.sizes.model)
    kept = {n: s for n, s in editor.streams.items() if s.session != request.session}
    return replace(editor, streams={**kept, request.stream: new})


def fits(editor: Editor, request: Request) -> bool:
    """Whether there is room for it with everybody edited as they asked.

    An older stream of the same session makes room for the newer: it is its ghost.
    """
    if not editor.holds(request.sizes.model):
        return False
    editor, (share, _) = _without(editor, request.session), shares_at(editor, request)
    return admits(
        editor.load, len(editor.streams), share,
        max_sessions=editor.max_sessions, measured=editor.measured,
    )  # fmt: skip


def has_room(editor: Editor, request: Request) -> bool:
    """As `fits`, and also where a live one finds it only when sessions are edited less well
    (`ladder`)."""
    if fits(editor, request):
        return True
    sizes = request.sizes
    if not request.live or not editor.holds(sizes.model) or editor.warm(sizes.model).means is None:
        return False
    editor, (_, least) = _without(editor, request.session), shares_at(editor, request)
    return admits(
        editor.least, len(editor.streams), least,
        max_sessions=editor.max_sessions, measured=editor.measured,
    )  # fmt: skip


def _without(editor: Editor, session: str) -> Editor:
    if session not in editor.sessions:
        return editor
    others = {n: s for n, s in editor.streams.items() if s.session != session}
    return replace(editor, streams=others)
