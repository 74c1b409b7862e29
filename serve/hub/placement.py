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

from serve.admission import admission, decisions
from serve.admission.admission import Demand, Editor, Request
from serve.admission.decisions import Need, Rank, Scale
from serve.versions.catalog import Catalog, Menu
from serve.versions.rolling import Plan
from serve.wire.protocol import RETRY_AFTER_S

RESERVED_S = 10.0  # for a placed stream to show in its editor's reports
ASKS_S = 0.5  # how often one that waits asks again
LEFT_S = 5.0  # who has not asked for so long is no longer in the queue
START_S = 30.0  # of an editor, until one has been seen to start
SESSION_S = 120.0  # of a session, until some have ended
KNOWN_SHAPES = 64  # sizes and rates that are remembered to have found no room
KNOWN_ENDS = 50  # sessions whose length counts for what is expected
EDITOR_GONE_S = 10.0
DECIDE_S = 0.25  # how long a decision on the number of editors holds


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
        rank: Rank = decisions.emptiest,
        catalog: Catalog | None = None,
        settle_s: float = 0.0,
    ) -> None:
        """`settle_s`: after the first report, for the other editors' to come."""
        self.scale, self.settle_s = scale, settle_s
        self.catalog = catalog or Catalog()
        self._clock = clock
        self._rank = rank
        # As they said they are, and with what was placed at them since.
        self._editors: dict[str, tuple[float, Editor]] = {}
        self._heard_at: float | None = None  # the first editor's report since this began
        self._leaving: frozenset[str] = frozenset()
        self._going: set[str] = set()
        self._gone_by_order: set[str] = set()  # names are never used again
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
        if editor.name not in self._editors and self._starting_since is not None:
            self._start_s = now - self._starting_since
        placed = {
            stream: (at, request)
            for stream, (at, request) in self._reserved.pop(editor.name, {}).items()
            if stream not in editor.streams and now - at < RESERVED_S
        }
        if placed:
            self._reserved[editor.name] = placed
        for _, request in placed.values():
            editor = decisions.with_stream(editor, request)
        self._know(editor, now)

    def gone(self, editors: frozenset[str]) -> None:
        """Serve stops these: they take nothing more."""
        if self._leaving - editors:
            self._no_room.clear()
        self._leaving = editors

    def released(self, stream: str) -> None:
        """A stream is over; its editor's next report says so, too."""
        self._queue.pop(stream, None)
        if (opened := self._opened.pop(stream, None)) is not None:
            self._lengths.append(self._clock() - opened)
        for name, (at, editor) in self._editors.items():
            if stream in editor.streams:
                left = {n: s for n, s in editor.streams.items() if n != stream}
                self._know(replace(editor, streams=left), at)
                self._reserved.get(name, {}).pop(stream, None)
                break

    # --- what is asked

    def ask(self, request: Request) -> Answer:
        """Where the stream goes; one that waits asks again every `ASKS_S`, by the same name.

        Until an editor has the model everybody waits: it is being loaded, or a hub that was started
        again does not know yet. A front gives up by itself (`serve.delivery.driver.OPENING_S`).
        """
        now = self._clock()
        if other := self.catalog.instead(request, self.editors):
            self._queue.pop(request.stream, None)
            return Retired(other)
        asked = self._queue.setdefault(request.stream, _Asked(request, now, now))
        asked.request, asked.last = request, now
        self._decide()
        order = decisions.line(a.request for a in self._queue.values())
        place = order.index(request)
        found = self._found(request, order[:place])
        if found is not None:
            del self._queue[request.stream]
            at, known = self._editors[found.name]
            self._editors[found.name] = (at, decisions.with_stream(known, request))
            self._reserved.setdefault(found.name, {})[request.stream] = (now, request)
            self._opened[request.stream] = now
            self._used[found.name, request.sizes.model] = now
            return Placed(found.name)
        if request.waits or request.again or self._cold(request.sizes.model):
            streams = sum(len(editor.streams) for editor in self.editors)
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
        if self._heard_at is None or self._clock() - self._heard_at < self.settle_s:
            return True
        return bool(state and not any(e.holds(model) for e in state))

    def _know(self, editor: Editor, at: float) -> None:
        self._editors[editor.name] = (at, editor)
        if self._no_room:
            left = self._no_room.items()
            self._no_room = {d: r for d, r in left if not admission.has_room(editor, r)}

    def _found(self, request: Request, before: list[Request]) -> Editor | None:
        demand = request.demand
        state, avoid = self.editors, self._closing
        ghost = any(request.session in editor.sessions for editor in state)  # makes room for it
        if demand in self._no_room and not ghost:
            return None
        found = decisions.place(state, request, avoid, self._rank)
        if found is None:
            if len(self._no_room) >= KNOWN_SHAPES:  # strangers choose sizes and rates
                self._no_room.clear()
            self._no_room[demand] = request
        elif before:  # they have their turn first, when they ask
            state, _ = decisions.place_all(state, before, avoid, self._rank)
            found = decisions.place(state, request, avoid, self._rank)
        return found

    @property
    def editors(self) -> list[Editor]:
        """As they will be when all that was placed is there; without those that go."""
        away = self._leaving | self._going
        return [editor for name, (_, editor) in self._editors.items() if name not in away]

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
        if editor in self._closing and not self._editors[editor][1].streams:
            self._going.add(editor)
            self._gone_by_order.add(editor)
        return editor in self._going

    def orders(self, editor: str) -> tuple[str, frozenset[str]]:
        """Keys that this editor is to load ("" for none) and to drop; said once."""
        self._decide()
        load, drop = self._plan.load.get(editor, ""), self._plan.drop.get(editor, frozenset())
        if (load or drop) and editor in self._editors:
            at, known = self._editors[editor]
            left = {key: n for key, n in (known.models or {}).items() if key not in drop}
            self._know(replace(known, models=left, loading=load or known.loading), at)
            self._plan = Plan(
                {e: key for e, key in self._plan.load.items() if e != editor},
                {e: keys for e, keys in self._plan.drop.items() if e != editor},
            )
        return load, drop

    def menu(self) -> Menu:
        """What may be chosen now."""
        return self.catalog.menu(self.editors)

    def notes(self) -> list[str]:
        """What an operator should know of the models."""
        return self.catalog.notes(self.editors)

    def asked_to_go(self, editor: str) -> bool:
        """Whether it was too many, or Serve stops it: then nothing is wrong when it is gone."""
        return editor in self._gone_by_order or editor in self._leaving

    def _decide(self) -> None:
        """How many editors there shall be and which are too many, anew every `DECIDE_S`."""
        now, scale = self._clock(), self.scale
        if self._decided is not None and now - self._decided < DECIDE_S:
            return
        self._decided = now
        self._sweep(now)
        state = self.editors
        demand = [asked.request for asked in self._queue.values()]
        demand += [request for _, request in self._refused.values()]
        need = decisions.needed(state, demand, scale.spare_editors)
        need = max(scale.min_editors, min(scale.max_editors, need))
        self._history, number = decisions.wanted(self._history, Need(now, need), scale.delay_s)
        if number != self._wanted_since[0]:
            self._wanted_since = (number, now)
        self.catalog.settle(state)
        missed = [a.request.sizes.model for a in self._queue.values() if a.last > a.first]
        missed += [request.sizes.model for _, request in self._refused.values()]
        self._plan = self.catalog.plan(state, self._used, list(dict.fromkeys(missed)))
        fixed = scale.min_editors == scale.max_editors
        self._closing = decisions.closing(state, 0 if fixed else len(state) - number)

    @property
    def _starting_since(self) -> float | None:
        """When an editor that is not there yet was first wanted."""
        number, since = self._wanted_since
        return since if number > len(self.editors) else None

    def _sweep(self, now: float) -> None:
        self._editors = {n: t for n, t in self._editors.items() if now - t[0] < EDITOR_GONE_S}
        self._going &= set(self._editors)
        self._used = {pair: at for pair, at in self._used.items() if pair[0] in self._editors}
        self._reserved = {n: r for n, r in self._reserved.items() if n in self._editors}
        self._queue = {n: a for n, a in self._queue.items() if now - a.last < LEFT_S}
        # Who was refused comes again after as long as the refusal advised.
        self._refused = {n: r for n, r in self._refused.items() if now - r[0] < RETRY_AFTER_S}
