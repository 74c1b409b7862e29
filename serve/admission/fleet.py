"""Editors in the order in which streams are tried at them: placement, one stream after another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from serve.admission.admission import Demand, Editor, Request, Seat, fits, has_room, with_stream

T = TypeVar("T")
GRAIN = 0.005  # of an editor
KNOWN_DEMANDS = 64  # sizes and rates for which is known who has no room

Rank = Callable[[Editor], tuple[Any, ...]]


def emptiest(editor: Editor) -> tuple[Any, ...]:
    """The order in which editors are tried; the simulation knows others, which lost."""
    return editor.load, len(editor.streams), editor.name


class Fleet:
    """Kept in order and found again by stream and session, so that with a thousand editors a stream
    is placed, and one that ends is found, in microseconds.

    Editors are values: what happens to a `trial` happens to no other.
    """

    def __init__(
        self,
        editors: Iterable[Editor] = (),
        rank: Rank = emptiest,
        before: Fleet | None = None,
        *,
        together: bool = True,
    ) -> None:
        self.rank, self.together = rank, together
        self._editors = {editor.name: editor for editor in before.editors} if before else {}
        self._order: list[tuple[Any, ...]] = []  # names come last and differ
        self._at: dict[str, str] = {}  # the editor of each stream
        self._sessions: dict[str, int] = {}  # streams of each
        self._before = before
        self._full: dict[
            tuple[Demand, bool], set[str]
        ] = {}  # editors without room for it, as asked
        self.grains: dict[int, int] = {}  # of all streams: how many have a share of so many
        for editor in editors:
            self.put(editor)

    def trial(self) -> Fleet:
        """As this one is now, for `place` and `place_all` only."""
        other = Fleet(rank=self.rank, before=self, together=self.together)
        other._order = self._order.copy()
        other.grains = self.grains.copy()
        other._full = {demand: names.copy() for demand, names in self._full.items()}
        return other

    def __len__(self) -> int:
        return len(self._editors)

    @property
    def editors(self) -> list[Editor]:
        return list(self._editors.values())

    @property
    def streams(self) -> int:
        return len(self._at)

    def get(self, name: str) -> Editor | None:
        return self._editors.get(name)

    def of(self, stream: str) -> Editor | None:
        """The editor that has it."""
        return self._editors[self._at[stream]] if stream in self._at else None

    def knows(self, session: str) -> bool:
        """Whether an editor has a stream of it."""
        return session in self._sessions or (
            self._before is not None and self._before.knows(session)
        )

    def put(self, editor: Editor) -> None:
        """In place of what was known of it."""
        before = self._unranked(editor.name)
        insort(self._order, self._entry(editor))
        self._editors[editor.name] = editor
        for name, stream in editor.streams.items():
            if before.get(name) != stream:
                self._at[name] = editor.name
                _count(self._sessions, stream.session, 1)
                _count(self.grains, grain(stream.share), 1)
        for name, stream in before.items():
            if (now := editor.streams.get(name)) != stream:
                self._forget(name, stream, editor.name, gone=now is None)

    def drop(self, name: str) -> None:
        for stream, held in self._unranked(name).items():
            self._forget(stream, held, name, gone=True)
        self._editors.pop(name, None)

    def _unranked(self, name: str) -> Mapping[str, Seat]:
        """What it has; it has no place in the order any more."""
        editor = self._editors.get(name)
        if editor is None:
            return {}
        del self._order[bisect_left(self._order, self._entry(editor))]
        for names in self._full.values():
            names.discard(name)
        return editor.streams

    def _forget(self, name: str, stream: Seat, editor: str, *, gone: bool) -> None:
        if gone and self._at.get(name) == editor:
            del self._at[name]
        _count(self._sessions, stream.session, -1)
        _count(self.grains, grain(stream.share), -1)

    def _entry(self, editor: Editor) -> tuple[Any, ...]:
        return *self.rank(editor), editor.name

    def place(self, request: Request, avoid: frozenset[str] = frozenset()) -> Editor | None:
        """The first editor with room for it as it asks; where none has, one with room when its
        sessions are edited less well, with `together` the last of them, so that few are. One of
        `avoid` only where no other has any."""
        if len(self._full) >= KNOWN_DEMANDS:  # strangers choose sizes and rates
            self._full.clear()
        found = self._first(fits, request, avoid)
        if found is None and request.live:
            found = self._first(has_room, request, avoid)
        return found or next(
            (
                self._editors[name]
                for room in (fits, has_room)
                for *_, name in self._order
                if name in avoid and room(self._editors[name], request)
            ),
            None,
        )

    def _first(
        self, room: Callable[[Editor, Request], bool], request: Request, avoid: frozenset[str]
    ) -> Editor | None:
        ghost = self.knows(request.session)  # it makes room for its own session
        known = (request.demand, room is fits)
        full = set[str]() if ghost else self._full.setdefault(known, set())
        last_first = self.together and room is has_room
        for *_, name in reversed(self._order) if last_first else self._order:
            if name in full or name in avoid:
                continue
            if room(self._editors[name], request):
                return self._editors[name]
            full.add(name)
        return None

    def place_all(
        self, requests: Iterable[Request], avoid: frozenset[str] = frozenset()
    ) -> list[Request]:
        """`place` for one after another, who take their places; returns who found none."""
        left: list[Request] = []
        refused: set[Demand] = set()  # fits nowhere, and loads only grow
        for request in requests:
            ghost = self.knows(request.session)
            if request.demand in refused and not ghost:
                left.append(request)
                continue
            found = self.place(request, avoid)
            if found is None:
                left.append(request)
                refused.add(request.demand)
                continue
            self.put(with_stream(found, request))
            if ghost:  # which may have been dearer
                refused.clear()
        return left


def grain(share: float) -> int:
    """To these shares are rounded when editors are counted."""
    return round(share / GRAIN)


def _count(numbers: dict[T, int], key: T, more: int) -> None:
    number = numbers.get(key, 0) + more
    if number > 0:
        numbers[key] = number
    else:  # in a trial also one that was counted before it
        numbers.pop(key, None)
