"""Which editor a stream goes to, who waits for one, and how many editors are wanted.

`Placement` keeps what `decisions` decides on: what editors reported, what was placed since,
who waits and who was refused. It lives in the hub, and asks no clock but the one it is given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from serve.admission import decisions
from serve.admission.admission import Demand, Editor, Request, fits, has_room, with_stream
from serve.admission.decisions import Need, Scale
from serve.admission.fleet import KNOWN_DEMANDS, Fleet, Rank, emptiest
from serve.versions.catalog import Catalog, Menu
from serve.versions.rolling import Offer, Plan
from serve.wire.protocol import RETRY_AFTER_S

RESERVED_S = 10.0  # for a placed stream to show in its editor's reports
ASKS_S = 0.5  # how often one that waits asks again
LEFT_S = 5.0  # who has not asked for so long is no longer in the queue
START_S = 30.0  # of an editor, until one has been seen to start
SESSION_S = 120.0  # of a session, until some have ended
KNOWN_ENDS = 50  # sessions whose length counts for what is expected
EDITOR_GONE_S = 10.0
DECIDE_S = 0.25  # how long a decision on the number of editors holds,
DECIDE_EDITOR_S = 0.0025  # or this for each that there is, if that is longer: it looks at them all


@dataclass(frozen=True)
class Placed:
    editor: str


@dataclass(frozen=True)
class Waiting:
    """`place` counts from 1."""

    place: int
    expected_s: float


@dataclass(frozen=True)
class Full:
    """No room, and the client does not wait."""


@dataclass(frozen=True)
class Retired:
    """The version is served no more; the session goes on with `model`: ask for that."""

    model: str


Answer = Placed | Waiting | Full | Retired


class Places(Protocol):
    """How a front asks, wherever the answer is made."""

    async def ask(self, request: Request) -> Answer: ...

    async def released(self, stream: str) -> None: ...


@dataclass
class _Asked:
    request: Request
    first: float
    last: float


class Placement:
    def __init__(
        self,
        scale: Scale,
        clock: Callable[[], float] = time.monotonic,
        rank: Rank = emptiest,
        catalog: Catalog | None = None,
        settle_s: float = 0.0,
        *,
        together: bool = True,
    ) -> None:
        """`settle_s`: after the first report, for the other editors' to come. Until then nothing is
        decided that what they hold could speak against."""
        self.scale, self.settle_s = scale, settle_s
        self.catalog = catalog or Catalog()
        self._clock = clock
        self._said: dict[str, float] = {}  # when they last reported
        # As they will be when all that was placed is there; without those that go.
        self._fleet = Fleet(rank=rank, together=together)
        self._aside: dict[str, Editor] = {}  # those that go
        self._heard_at: float | None = None  # the first editor's report since this began
        self._leaving: frozenset[str] = frozenset()
        self._going: set[str] = set()  # for ever: names are never used again
        self._reserved: dict[str, dict[str, tuple[float, Request]]] = {}  # by editor and stream
        self._queue: dict[str, _Asked] = {}
        # Sizes and rates that no editor has room for: a long queue asks twice a second each.
        self._no_room: dict[Demand, Request] = {}
        self._refused: dict[str, tuple[float, Request]] = {}
        self._opened: dict[str, float] = {}
        self._lengths: deque[float] = deque(maxlen=KNOWN_ENDS)
        self._history: list[Need] = []
        self._wanted_since: tuple[int, float] = (0, 0.0)
        self._decided: float | None = None  # when
        self._closing: frozenset[str] = frozenset()
        self._start_s = START_S
        self._used: dict[tuple[str, str], float] = {}  # when an editor last got a model's session
        self._plan = Plan()

    # --- what is told

    def report(self, editor: Editor) -> None:
        """An editor's own word; it holds for what was placed before, too."""
        now = self._clock()
        self._heard_at = now if self._heard_at is None else self._heard_at
        reserved = self._reserved.pop(editor.name, {})
        if editor.name not in self._said and self._starting_since is not None:
            self._start_s = now - self._starting_since
        self._said[editor.name] = now
        if not reserved and self._known(editor.name) is editor:
            return
        placed = {
            stream: (at, request)
            for stream, (at, request) in reserved.items()
            if stream not in editor.streams and now - at < RESERVED_S
        }
        if placed:
            self._reserved[editor.name] = placed
        for _, request in placed.values():
            editor = with_stream(editor, request)
        self._know(editor)

    def gone(self, editors: frozenset[str]) -> None:
        """Serve stops these: they take nothing more."""
        self._leaving = editors
        for editor in [*self._fleet.editors, *self._aside.values()]:
            self._know(editor)

    def released(self, stream: str) -> None:
        """A stream is over; its editor's next report says so, too."""
        self._queue.pop(stream, None)
        if (opened := self._opened.pop(stream, None)) is not None:
            self._lengths.append(self._clock() - opened)
        aside = (editor for editor in self._aside.values() if stream in editor.streams)
        editor = self._fleet.of(stream) or next(aside, None)
        if editor is not None:
            left = {n: s for n, s in editor.streams.items() if n != stream}
            self._reserved.get(editor.name, {}).pop(stream, None)
            self._know(replace(editor, streams=left))

    # --- what is asked

    def ask(self, request: Request) -> Answer:
        """Where the stream goes; one that waits asks again every `ASKS_S`, by the same name.

        Until an editor has the model everybody waits: it is being loaded, or a hub that was started
        again does not know yet. A front gives up by itself (`serve.delivery.driver.OPENING_S`).
        """
        now = self._clock()
        known = self._heard_for(self.settle_s)
        if known and (other := self.catalog.instead(request, self.editors)):
            self._queue.pop(request.stream, None)
            return Retired(other)
        asked = self._queue.setdefault(request.stream, _Asked(request, now, now))
        asked.request, asked.last = request, now
        self._decide()
        order = decisions.line(a.request for a in self._queue.values())
        place = next(n for n, other in enumerate(order) if other is request)
        found = self._found(request, order[:place])
        if found is not None:
            del self._queue[request.stream]
            self._fleet.put(with_stream(found, request))
            self._reserved.setdefault(found.name, {})[request.stream] = (now, request)
            self._opened[request.stream] = now
            self._used[found.name, request.sizes.model] = now
            return Placed(found.name)
        if request.waits or request.again or self._cold(request.sizes.model):
            streams = self._fleet.streams
            length = sum(self._lengths) / len(self._lengths) if self._lengths else SESSION_S
            starting = None
            if self._starting_since is not None:
                starting = max(1.0, self._starting_since + self._start_s - now)
            return Waiting(place + 1, decisions.expected_s(place + 1, streams, length, starting))
        del self._queue[request.stream]
        self._refused[request.stream] = (now, request)
        return Full()

    def _cold(self, model: str) -> bool:
        """Whether there is only to wait until an editor has it."""
        state = self.editors
        if not self._heard_for(self.settle_s):
            return True
        return bool(state and not any(e.holds(model) for e in state))

    def _heard_for(self, seconds: float) -> bool:
        """Whether the first editor reported so long ago."""
        return self._heard_at is not None and self._clock() - self._heard_at >= seconds

    def _known(self, name: str) -> Editor | None:
        return self._fleet.get(name) or self._aside.get(name)

    def _know(self, editor: Editor) -> None:
        if editor.name in self._leaving or editor.name in self._going:
            self._fleet.drop(editor.name)
            self._aside[editor.name] = editor
            return
        self._aside.pop(editor.name, None)
        self._fleet.put(editor)
        if self._no_room:
            left = self._no_room.items()
            self._no_room = {s: r for s, r in left if not has_room(editor, r)}

    def _found(self, request: Request, before: list[Request]) -> Editor | None:
        fleet, avoid, demand = self._fleet, self._closing | request.avoid, request.demand
        if demand in self._no_room and not fleet.knows(
            request.session
        ):  # a ghost makes room for it
            return None
        found = fleet.place(request, avoid)
        if found is None:
            if len(self._no_room) >= KNOWN_DEMANDS:  # strangers choose sizes and rates
                self._no_room.clear()
            self._no_room[demand] = request
        elif before:  # they have their turn first, when they ask
            after = fleet.trial()
            after.place_all(before, avoid)
            found = after.place(request, avoid)
        if found is not None and not self._heard_for(self.settle_s) and not fits(found, request):
            return None  # those that have not reported yet may have room for it as it asks
        return found

    @property
    def editors(self) -> list[Editor]:
        """As they will be when all that was placed is there; without those that go."""
        return self._fleet.editors

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def wanted(self) -> int:
        """Editors that there should be now."""
        self._decide()
        return self._wanted_since[0]

    def may_go(self, editor: str) -> bool:
        """Whether this editor is too many and empty: then it is to leave."""
        self._decide()
        if editor in self._closing and (known := self._known(editor)) and not known.streams:
            self._going.add(editor)
            self._know(known)
        return editor in self._going

    def orders(self, editor: str) -> tuple[str, frozenset[str]]:
        """Keys that this editor is to load ("" for none) and to drop; said once."""
        self._decide()
        load, drop = self._plan.load.get(editor, ""), self._plan.drop.get(editor, frozenset())
        if (load or drop) and (known := self._known(editor)):
            left = {key: n for key, n in (known.models or {}).items() if key not in drop}
            self._know(replace(known, models=left, loading=load or known.loading, priced={}))
            self._plan = Plan(
                {e: key for e, key in self._plan.load.items() if e != editor},
                {e: keys for e, keys in self._plan.drop.items() if e != editor},
            )
        return load, drop

    def menu(self) -> Menu | None:
        """What may be chosen now; None until all editors have spoken: the shares of those that
        have would be taken for everybody's."""
        return self.catalog.menu(self.editors) if self._heard_for(self.settle_s) else None

    def offers(self) -> tuple[Offer, ...]:
        """As the editors that have spoken can keep them."""
        return self.catalog.offers(self.editors)

    def notes(self) -> list[str]:
        """What an operator should know of the models."""
        return self.catalog.notes(self.editors)

    def asked_to_go(self, editor: str) -> bool:
        """Whether it was too many, or Serve stops it: then nothing is wrong when it is gone."""
        return editor in self._going or editor in self._leaving

    def _decide(self) -> None:
        """How many editors there shall be and which are too many, anew every `DECIDE_S`."""
        now, scale = self._clock(), self.scale
        every = max(DECIDE_S, len(self._fleet) * DECIDE_EDITOR_S)
        if self._decided is not None and now - self._decided < every:
            return
        self._decided = now
        self._sweep(now)
        state = self.editors
        demand = [asked.request for asked in self._queue.values()]
        demand += [request for _, request in self._refused.values()]
        need = decisions.needed(self._fleet, demand, scale.spare_editors)
        need = max(scale.min_editors, min(scale.max_editors, need))
        self._history, number = decisions.wanted(self._history, Need(now, need), scale.delay_s)
        if number != self._wanted_since[0]:
            self._wanted_since = (number, now)
        if self._heard_for(self.settle_s):
            self.catalog.settle(state)
            missed = [a.request.sizes.model for a in self._queue.values() if a.last > a.first]
            missed += [request.sizes.model for _, request in self._refused.values()]
            self._plan = self.catalog.plan(state, self._used, list(dict.fromkeys(missed)))
        # One started again must not take for too many what it has not watched for the delay.
        watched = self._heard_for(max(self.settle_s, scale.delay_s))
        scales = scale.min_editors < scale.max_editors and watched
        self._closing = decisions.closing(state, len(state) - number if scales else 0)

    @property
    def _starting_since(self) -> float | None:
        """When an editor that is not there yet was first wanted."""
        number, since = self._wanted_since
        return since if number > len(self._fleet) else None

    def _sweep(self, now: float) -> None:
        for name in [n for n, at in self._said.items() if now - at >= EDITOR_GONE_S]:
            del self._said[name]
            self._fleet.drop(name)
            self._aside.pop(name, None)
            self._reserved.pop(name, None)
            # Nobody asks for it again; it would only grow with every editor that ever was.
            self._used = {pair: at for pair, at in self._used.items() if pair[0] != name}
        self._queue = {n: a for n, a in self._queue.items() if now - a.last < LEFT_S}
        # Who was refused comes again after as long as the refusal advised.
        self._refused = {n: r for n, r in self._refused.items() if now - r[0] < RETRY_AFTER_S}
