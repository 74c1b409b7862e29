"""Which version a session gets and what an editor holds: pure functions of what is known.

A name that clients choose stands for a `stable` version and, while its alias has moved or a canary
runs, for a `target` that an editor takes in beside it. Nothing here waits, asks or reads a clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from serve.admission.admission import Editor


@dataclass(frozen=True)
class Version:
    """What is known of a version before an editor has it. `key` is its name in the application.

    `trained` is (height, width), `size` the bytes of its weights; streams can go on with another
    version of the same `lineage`, to which their latents mean the same.
    """

    key: str
    trained: tuple[int, int]
    size: int = 0
    lineage: str = ""


@dataclass(frozen=True)
class Offer:
    """What clients choose by `name`: of new sessions a `share` is for `target`, if there is one."""

    name: str
    stable: str
    target: str = ""
    share: float = 1.0

    @property
    def keys(self) -> list[str]:
        return [self.stable, self.target] if self.target else [self.stable]

    def choose(self, session: str) -> str:
        """The same for the same session; as the share grows nobody goes back to `stable`."""
        return self.target if self.target and _draw(session) < self.share else self.stable


def _draw(session: str) -> float:
    """From 0 to 1, below 1."""
    return int.from_bytes(hashlib.sha256(session.encode()).digest()[:6], "big") / 2**48


def present(offer: Offer, editors: Sequence[Editor]) -> Offer:
    """The offer as it can be kept now: its target takes what it is meant to, as far as the editors
    that have the model have the target. Without one that has it, all goes to `stable`."""
    if not offer.target:
        return offer
    either = [e for e in editors if any(map(e.holds, offer.keys))]
    ready = sum(editor.holds(offer.target) for editor in either)
    return replace(offer, share=min(offer.share, ready / max(1, len(either))))


def settled(offer: Offer, editors: Sequence[Editor]) -> Offer:
    """With the target as `stable`, once it is meant to have all and is wherever `stable` is."""
    if not offer.target:
        return offer
    ready = {editor.name for editor in editors if editor.holds(offer.target)}
    still = {editor.name for editor in editors if editor.holds(offer.stable)}
    if offer.share >= 1 and ready and still <= ready:
        return Offer(offer.name, offer.target)
    return offer


def pointed(offer: Offer, target: str, share: float, before: str = "") -> Offer:
    """The offer after its alias was found at `target`; `before` is the version before that, where
    the registry knows it and a share is set: that is what a restart in a canary goes back to."""
    stable = offer.stable
    if target == stable and share < 1 and before:
        stable = before
    return Offer(offer.name, stable, target if target != stable else "", share)


def split(offer: Offer, failed: Collection[str]) -> Offer:
    """Without its target where that has failed."""
    return Offer(offer.name, offer.stable) if offer.target in failed else offer


@dataclass(frozen=True)
class Plan:
    """What editors are to do next: at most one key each to `load`, those to `drop`."""

    load: Mapping[str, str] = field(default_factory=dict)
    drop: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shelves:
    """What a plan is made of beside the editors.

    `versions` are all that are known, by key; `budget` bytes of weights may lie in an editor, 0 for
    any number. `used` says when an editor last got a session of a version, `asked` are the keys
    that somebody waits for. What `refused` says, pairs of editor and key, has failed there.
    Sessions of a version of `moving` do not keep it: they go on with another.
    """

    versions: Mapping[str, Version]
    budget: int = 0
    used: Mapping[tuple[str, str], float] = field(default_factory=dict)
    asked: Collection[str] = ()
    refused: Collection[tuple[str, str]] = ()
    moving: Collection[str] = ()


Pace = Callable[[int], int]


def doubling(having: int) -> int:
    """By how many editors at a time a version is loaded that so many have: as many, at least one,
    so that what is broken meets one editor. The simulation knows others, which lost."""
    return max(1, having)


def plan(
    editors: Sequence[Editor], offers: Sequence[Offer], shelves: Shelves, pace: Pace = doubling
) -> Plan:
    """Loads and drops that bring the editors to what is offered.

    A version is loaded by as many editors at a time as `pace` says. Where not all fit, an editor
    keeps what it has until somebody waits for something else; then what was not used for longest
    leaves, where no session uses it. Without being waited for, a version takes the place of what is
    offered no more, and one that is to have all, once an editor has it, that of the one before it.
    """
    stable = [offer.stable for offer in offers]
    targets = [offer.target for offer in offers if offer.target]
    asked = [key for key in shelves.asked if key in shelves.versions]
    wanted = dict.fromkeys([*stable, *targets, *asked])
    if all((editor.models or {}).keys() == wanted.keys() for editor in editors):
        return Plan()
    drop = {editor.name: _dropped(editor, wanted, shelves) for editor in editors}
    load: dict[str, str] = {}
    for key in sorted(wanted, key=lambda key: key not in asked):
        having = sum(editor.holds(key) for editor in editors)
        left = pace(having) - sum(editor.loading == key for editor in editors)
        keep = set(wanted) - _replaced(key, offers)
        if key in targets and not having:  # tried
            keep = _only(stable, editors)
        if key in asked:
            keep = set()
        order = sorted(editors, key=lambda editor: (editor.load, len(editor.streams), editor.name))
        for editor in order:
            busy = editor.loading or editor.name in load or editor.holds(key)
            if left < 1 or busy or (editor.name, key) in shelves.refused:
                continue
            gives = _room_for(key, editor, drop[editor.name], shelves, keep)
            if gives is not None:
                load[editor.name] = key
                drop[editor.name] |= gives
                left -= 1
    return Plan(load, {name: keys for name, keys in drop.items() if keys})


def _only(stable: Iterable[str], editors: Sequence[Editor]) -> set[str]:
    """Those that a single editor has: a target that is tried must not cost them."""
    return {key for key in stable if sum(editor.holds(key) for editor in editors) == 1}


def _replaced(key: str, offers: Sequence[Offer]) -> set[str]:
    """What `key` takes all new sessions from, where nobody else chooses it."""
    old = {offer.stable for offer in offers if offer.target == key and offer.share >= 1}
    others = (offer.keys for offer in offers if offer.target != key)
    return old.difference(*others)


def fits_nowhere(
    key: str, offers: Sequence[Offer], editors: Sequence[Editor], shelves: Shelves
) -> bool:
    """Whether no editor can try it, even without sessions: beside what it alone has."""
    keep = _only([offer.stable for offer in offers], editors)
    idle = (replace(editor, streams={}) for editor in editors)
    return all(_room_for(key, e, frozenset(), shelves, keep) is None for e in idle)


def _dropped(editor: Editor, wanted: Collection[str], shelves: Shelves) -> frozenset[str]:
    """What is offered no more and may leave; an editor always keeps something that is offered."""
    old = [key for key in editor.models or () if key not in wanted]
    if len(old) == len(editor.models or ()):
        return frozenset()
    return frozenset(key for key in old if not editor.uses(key) or key in shelves.moving)


def instead(
    key: str, offer: Offer, versions: Mapping[str, Version], *, session: str, running: bool
) -> str:
    """The version for a session of `offer` whose `key` is offered no more; "" for none: a `running`
    one can only go on with a version of the same lineage."""
    other = offer.choose(session)
    known = key in versions and other in versions
    same = known and versions[key].lineage == versions[other].lineage != ""
    return other if same or not running else ""


def _room_for(
    key: str,
    editor: Editor,
    leaving: frozenset[str],
    shelves: Shelves,
    keep: Collection[str],
) -> frozenset[str] | None:
    """What has to leave so that `key` fits, nothing of `keep`; None where it cannot."""
    sizes = {k: shelves.versions[k].size for k in shelves.versions}
    there = [k for k in editor.models or () if k not in leaving or editor.uses(k)]
    over = sum(sizes.get(k, 0) for k in there) + sizes[key] - shelves.budget
    if not shelves.budget or over <= 0:
        return frozenset()
    unused = [k for k in there if not editor.uses(k) and k not in keep]
    gives = set[str]()
    for k in sorted(unused, key=lambda k: shelves.used.get((editor.name, k), 0.0)):
        if over > 0:
            gives.add(k)
            over -= sizes.get(k, 0)
    return frozenset(gives) if over <= 0 else None


def first(
    keys: Iterable[str], versions: Mapping[str, Version], budget: int, having: Mapping[str, int]
) -> list[str]:
    """What of `keys` an editor that starts loads: what the fewest have (`having`), as much as fits,
    and one in any case."""
    left, found = budget, list[str]()
    for key in sorted(dict.fromkeys(keys), key=lambda key: having.get(key, 0)):
        size = versions[key].size
        if not budget or size <= left or not found:
            found.append(key)
            left -= size
    return found
