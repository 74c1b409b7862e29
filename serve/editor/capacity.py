"""How many sessions an editor takes, and how well it edits each: by what chunks cost, measured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from modeling.detail.work_size import in_words
from modeling.editor import StreamingEditor
from modeling.streaming.device import DeviceClock, to_device, to_host
from modeling.streaming.quality import Quality
from modeling.streaming.stream import EditStream
from serve.admission import admission, ladder
from serve.admission.admission import Editor, Seat, Sizes, Warm
from serve.admission.ladder import Calm, Decision, Held
from serve.admission.rungs import FULL, Means, Rung, Size, rungs, slowed
from serve.wire.protocol import RETRY_AFTER_S, Detail, WireError
from serve.wire.work import Opening
from serve.work_sizes import sizes_of

NEWEST = 0.1  # weight of the newest chunk in what is known of the cost
KNOWN = 64  # sizes whose cost is remembered: clients choose them
WARM_CHUNKS = 3  # as `_chunk_seconds` says, where the window is full already
SHOWN_AT = 2  # times the model's own sides: frames whose showing is measured


@dataclass
class Load:
    """A stream's part in the accelerator.

    `cost` is what its own chunks take, in seconds, on its rung of the ladder, which counts from 0.
    `rungs` and `chunk_frames` are its version's, which may leave before it does.
    """

    opening: Opening
    cost: float
    since: float
    rungs: tuple[Rung, ...]
    chunk_frames: int
    rung: int = 0
    warm: tuple[float, ...] = ()  # what its rungs cost beside each other, by
    warm_by: tuple[dict[Sizes, float], float] | None = None  # these costs, never changed in place
    shares: tuple[float, ...] = ()  # on each rung, by
    shares_by: tuple[float, int, tuple[float, ...]] | None = None  # cost, rung and `warm`


class Capacity:
    """Sums the streams' shares, which follow what their chunks cost while they run.

    With `means` they are edited less well under pressure (`serve.admission.ladder`). These and
    `chunk_frames` are of a model that is not warm yet.
    """

    def __init__(
        self,
        *,
        max_sessions: int,
        chunk_frames: int = 12,
        measured: bool = True,
        means: Means | None = None,
        degrade: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.means = means
        self.degrade = measured and (degrade or means is not None)
        self._clock, self._calm = clock, Calm()
        self.chunk_frames, self.max_sessions, self.measured = chunk_frames, max_sessions, measured
        self.loads: dict[str, Load] = {}  # by a name of the stream's own, not its session's
        self.costs: dict[Sizes, float] = {}  # seconds a chunk
        self.warm: dict[Sizes, float] = {}  # what they were at the start, all at one time
        self.frame_s = 0.0  # of them for every pixel of a frame, outside of the networks
        self.models: dict[str, Warm] = {}  # by key: versions that are here, and warm
        self._names = itertools.count()

    def warm_up(
        self,
        editor: StreamingEditor,
        model: str = "",
        sizes: Iterable[Sizes] = (),
        tell: Callable[[str], None] = lambda doing: None,
    ) -> Iterator[None]:
        """Edits chunks of the model's own size, and of `sizes`, one at each step; after the last
        sessions may have it. `tell` hears what is done.
        """
        means = means_of(editor) if self.degrade else None
        for each in dict.fromkeys([native(editor, model), *sizes]):
            tell(f"warming {in_words(each.frame)} at {in_words(each.work)}")
            lower = rungs(means, each.frame, each.work, live=True)[1:] if means else ()
            for sizes_then, seconds in _chunk_seconds(editor, each, lower):
                self.costs = {**self.costs, sizes_then: seconds}  # another thread may be reading
                self.warm = {**self.warm, sizes_then: seconds}
                yield
        tell("measuring capacity")
        self.frame_s = _frame_seconds(editor)
        self.models = {**self.models, model: Warm(editor.settings.chunk_frames, means)}

    def forget(self, model: str) -> None:
        """A version is no longer here."""
        self.models.pop(model, None)
        self.costs = {sizes: c for sizes, c in self.costs.items() if sizes.model != model}
        self.warm = {sizes: c for sizes, c in self.warm.items() if sizes.model != model}

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
        return admission.cost_of(self.costs, sizes, self.frame_s)

    def share(self, name: str) -> float:
        """Of the accelerator, edited as its client asked."""
        return self._shares(self.loads[name])[0]

    @property
    def load(self) -> float:
        """What is promised: above 1 where not all are edited as they asked."""
        return sum(self.share(name) for name in self.loads)

    def rung(self, name: str) -> Rung:
        """How the stream is to be edited from its next chunk on."""
        load = self.loads[name]
        return load.rungs[load.rung]

    def decide(self) -> Decision:
        """Everybody's rung, anew: see `ladder.decide`."""
        now = self._clock()
        if not self.degrade:
            return Decision({}, self._calm)
        held = [
            Held(name, load.opening.mode == "live", load.rung, self._shares(load), load.since)
            for name, load in self.loads.items()
        ]
        decision = ladder.decide(held, self._calm, now)
        self._calm = decision.calm
        for name, rung in decision.rungs.items():
            load = self.loads[name]
            load.cost = self._cost_on(load, rung)
            load.rung = rung
        return decision

    def _rungs(self, sizes: Sizes, *, live: bool) -> tuple[Rung, ...]:
        means = self._warm(sizes.model).means
        if means is None:
            return (Rung(FULL, sizes.work),)
        return rungs(means, sizes.frame, sizes.work, live=live)

    def _warm(self, model: str) -> Warm:
        return self.models.get(model) or Warm(self.chunk_frames, self.means)

    def _cost_on(self, load: Load, rung: int) -> float:
        """Seconds that its chunks would take there, by what they take where it is.

        What rungs cost beside each other is known from the warm-up: later costs are of other times,
        and one that was measured while the machine was busy would keep a session down for ever.
        """
        warm = self._on_rungs(load)
        here = warm[load.rung]
        return load.cost * (warm[rung] / here if here else 1.0)

    def _on_rungs(self, load: Load) -> tuple[float, ...]:
        by = load.warm_by
        if by is None or by[0] is not self.warm or by[1] != self.frame_s:
            sizes = sizes_of(load.opening)
            load.warm_by = self.warm, self.frame_s
            load.warm = tuple(
                admission.cost_of(self.warm, sizes.at(rung), self.frame_s) for rung in load.rungs
            )
        return load.warm

    def _shares(self, load: Load) -> tuple[float, ...]:
        """On each of its rungs."""
        warm = self._on_rungs(load)
        by = load.cost, load.rung, warm
        if load.shares_by == by:
            return load.shares
        fps, found = load.opening.fps, []
        here = warm[load.rung]
        for number, rung in enumerate(load.rungs):
            cost = load.cost * (warm[number] / here if here else 1.0)
            share = admission.share_of(cost, fps, load.chunk_frames)
            found.append(slowed(share, cost) if rung.name == "slowed" else share)
        load.shares_by, load.shares = by, tuple(found)
        return load.shares

    def admit(self, opening: Opening) -> str:
        """Counts the stream in; returns the name to release it by.

        Raises WireError `at_capacity` when it does not fit.
        """
        sizes = sizes_of(opening)
        rungs_here = self._rungs(sizes, live=opening.mode == "live")
        frames = self._warm(opening.version).chunk_frames
        load = Load(opening, self.cost(sizes), self._clock(), rungs_here, frames)
        share = self._shares(load)[0]
        if not self._admits(load):
            raise WireError(
                "at_capacity",
                f"{len(self.loads)} sessions use {self.load:.0%} of this editor and this one would "
                f"need {share:.0%}; try again later",
                RETRY_AFTER_S,
            )
        name = opening.stream or f"{opening.session}-{next(self._names)}"
        self.loads[name] = load
        return name

    def _admits(self, new: Load) -> bool:
        """As `admission.has_room`, by what is known here."""
        shares = [self._shares(load) for load in (new, *self.loads.values())]
        live = new.opening.mode == "live" and self.degrade
        for of in (max, min) if live else (max,):
            share, *others = map(of, shares)
            if admission.admits(
                sum(others),
                len(others),
                share,
                max_sessions=self.max_sessions,
                measured=self.measured,
            ):
                return True
        return False

    def known(self, name: str, loading: str = "") -> Editor:
        """What placement knows of this editor, called `name` there."""
        streams = {}
        for stream, load in self.loads.items():
            shares, opening = self._shares(load), load.opening
            streams[stream] = Seat(opening.session, shares[0], min(shares), opening.version)
        return Editor(
            name,
            self.chunk_frames,
            self.max_sessions,
            streams,
            dict(self.costs),
            self.measured,
            self.frame_s,
            self.means,
            dict(self.models),
            loading,
        )

    def release(self, name: str) -> None:
        self.loads.pop(name, None)


def native(editor: StreamingEditor, model: str = "") -> Sizes:
    """Frames of the size that the model was trained at, edited as they are."""
    own: Size = (editor.settings.height, editor.settings.width)
    return Sizes(own, own, model=model)


def means_of(editor: StreamingEditor) -> Means:
    """What its model allows."""
    steps, masked = len(editor.settings.timesteps), editor.mask_cache is not None
    return Means(tuple(editor.trained_at), steps, masked)


def _chunk_seconds(
    editor: StreamingEditor, sizes: Sizes, lower: Iterable[Rung]
) -> Iterator[tuple[Sizes, float]]:
    """What each chunk costs until its window is full, and then on each of the `lower` rungs; the
    last of its sizes counts.

    The first that sees a full window pays for what is done once (kernel choice, graphs,
    allocation), the second still on a GPU, which counts a chunk's refresh with the next chunk.
    The third costs what all others will.
    """
    settings, (height, width) = editor.settings, sizes.frame
    detail: Detail = "source" if sizes.detail == "source" else "off"
    stream = editor.open(
        "warm up", height=height, width=width, work_size=in_words(sizes.work), detail=detail
    )
    for seconds in _costs(stream, settings.window_latents // settings.chunk_latents + 2):
        yield sizes, seconds
    for rung in lower:
        stream.change(quality_of(rung))
        for seconds in _costs(stream, WARM_CHUNKS):
            yield sizes.at(rung), seconds


def quality_of(rung: Rung) -> Quality:
    return Quality(rung.work, rung.sparing, rung.halved)


def _costs(stream: EditStream, chunks: int) -> Iterator[float]:
    """Seconds of each of so many."""
    for _ in range(chunks):
        frames = np.zeros((stream.wanted_frames, stream.height, stream.width, 3), np.uint8)
        for chunk in stream.push(frames):
            yield chunk.compute_ms / 1000


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
