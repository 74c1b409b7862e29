"""What may be chosen by name, which version that is, and what has failed: kept for `rolling`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from serve.admission.admission import Editor, Request
from serve.versions import rolling
from serve.versions.rolling import Offer, Pace, Version
from serve.wire.protocol import WireError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Menu:
    """What clients choose from; the first is for those who do not."""

    offers: tuple[Offer, ...]
    versions: Mapping[str, Version] = field(default_factory=dict)

    def offer(self, name: str | None) -> Offer:
        """Raises WireError `bad_request` that names all there are."""
        found = [offer for offer in self.offers if name in (None, offer.name)]
        if not found:
            known = ", ".join(offer.name for offer in self.offers)
            raise WireError("bad_request", f"no model {str(name)[:60]!r} is served; choose {known}")
        return found[0]

    def choose(self, name: str | None, session: str) -> tuple[str, Version]:
        """Name and version for a new session. Raises WireError as `offer` does."""
        offer = self.offer(name)
        return offer.name, self.versions[offer.choose(session)]


class Catalog:
    """Args:
    budget: Bytes of weights that may lie in one editor; 0 for any number.
    move: Sessions of a version that was replaced are moved, where its lineage allows.
    """

    def __init__(
        self, *, budget: int = 0, move: bool = False, pace: Pace = rolling.doubling
    ) -> None:
        self.budget, self.move, self.pace = budget, move, pace
        self.versions: dict[str, Version] = {}
        self.failed: dict[str, str] = {}  # targets that are not taken, and why
        self.refused: set[tuple[str, str]] = set()  # editor and key that it could not load
        self._offers: dict[str, Offer] = {}  # as they are meant
        self._moving: set[str] = set()

    # --- what is told

    def serve(self, first: Mapping[str, Version], moving: Collection[str] = ()) -> None:
        """These names, in this order. One of `moving`, whose alias is followed, goes on as it is;
        any other is now what it says."""
        had = {name: offer for name, offer in self._offers.items() if name in moving}
        self._offers = {
            name: had.get(name, Offer(name, version.key)) for name, version in first.items()
        }
        self.versions |= {version.key: version for version in first.values()}

    def point(self, name: str, target: Version, share: float, before: Version | None) -> None:
        """The alias behind `name` is at `target`, and was at `before`."""
        for version in (target, before):
            if version is not None:
                self.versions[version.key] = version
        offer = self._offers[name]
        new = rolling.pointed(offer, target.key, share, before.key if before else "")
        if new != offer:
            coming = f"{new.share:.0%} for {new.target}" if new.target else "no other"
            log.info("%s: %s is served, and %s", name, new.stable, coming)
        self._offers[name] = new
        self._moving.discard(target.key)
        named = {key for each in self._offers.values() for key in each.keys}
        # What nobody points at any more may be tried again.
        self.failed = {key: why for key, why in self.failed.items() if key in named}
        self.refused = {pair for pair in self.refused if pair[1] in named}

    def fail(self, key: str, why: str, editor: str = "") -> None:
        """It could not be loaded; a target takes no session from here on, wherever it is."""
        if editor:
            self.refused.add((editor, key))
        if key not in self.failed and any(key == o.target for o in self._offers.values()):
            log.error("%s takes no sessions: %s", key, why)
            self.failed[key] = why

    def gone(self, editors: Sequence[str]) -> None:
        """Nothing is known of these any more."""
        self.refused = {pair for pair in self.refused if pair[0] not in editors}

    def settle(self, editors: Sequence[Editor]) -> None:
        """Targets that are everywhere are stable from here on."""
        for name, offer in self._offers.items():
            new = rolling.settled(rolling.split(offer, self.failed), editors)
            if new.stable == offer.stable:
                continue
            self._offers[name] = new
            log.info("%s: %s has replaced %s", name, new.stable, offer.stable)
            if self.move and self._lineage(new.stable) == self._lineage(offer.stable) != "":
                self._moving.add(offer.stable)

    # --- what is asked

    def offers(self, editors: Sequence[Editor]) -> tuple[Offer, ...]:
        """As they can be kept now."""
        return tuple(rolling.present(offer, editors) for offer in self._meant)

    def menu(self, editors: Sequence[Editor]) -> Menu:
        offers = self.offers(editors)
        keys = {key for offer in offers for key in offer.keys}
        return Menu(offers, {key: self.versions[key] for key in keys})

    def instead(self, request: Request, editors: Sequence[Editor]) -> str:
        """The version that the session gets in place of its own, "" where that is still there."""
        found = [offer for offer in self.offers(editors) if offer.name == request.name]
        key = request.sizes.model
        if not found or key in found[0].keys:
            return ""
        running = request.again
        if running and key not in self._moving and any(editor.holds(key) for editor in editors):
            return ""
        return rolling.instead(
            key, found[0], self.versions, session=request.session, running=running
        )

    def plan(
        self,
        editors: Sequence[Editor],
        used: Mapping[tuple[str, str], float],
        asked: Sequence[str],
    ) -> rolling.Plan:
        return rolling.plan(editors, self._meant, self._shelves(used, asked), self.pace)

    def notes(self, editors: Sequence[Editor]) -> list[str]:
        """What an operator should know, in a sentence each; the logs say why."""
        told = [f"{key} takes no sessions: it could not be loaded" for key in self.failed]
        for offer in self.offers(editors):
            if offer.target:
                ready = sum(editor.holds(offer.target) for editor in editors)
                told.append(
                    f"{offer.name}: {offer.target} is on {ready} of {len(editors)} editors and "
                    f"gets {offer.share:.0%} of new sessions, {offer.stable} the rest"
                )
                told += self._waits(offer, editors)
        told += [
            f"editor {editor} could not load {key.rpartition('/')[2]}"
            for editor, key in sorted(self.refused)
            if key not in self.failed
        ]
        return told

    def _waits(self, offer: Offer, editors: Sequence[Editor]) -> list[str]:
        """Why it goes on slowly, or never does, where not all fits in an editor."""
        new, old, size = offer.target, offer.stable, self._size
        tried = any(new == editor.loading or editor.holds(new) for editor in editors)
        if (
            not tried
            and editors
            and rolling.fits_nowhere(new, self._meant, editors, self._shelves({}, ()))
        ):
            least = min(sum(map(size, editor.models or ())) for editor in editors) + size(new)
            return [
                f"{offer.name}: no editor has room for {new} beside what it alone holds; raise "
                f"editor_memory_gb from {self.budget / 1e9:g} to {least / 1e9:.3g}, or max_editors"
            ]
        busy = sum(e.uses(old) and not e.holds(new) and e.loading != new for e in editors)
        if not busy or not self.budget or size(new) + size(old) <= self.budget:
            return []
        return [
            f"{offer.name}: {new} does not fit beside {old}, and waits for the last session of "
            f"that on {busy} editor{'s' * (busy > 1)}"
        ]

    @property
    def _meant(self) -> list[Offer]:
        return [rolling.split(offer, self.failed) for offer in self._offers.values()]

    def _shelves(
        self, used: Mapping[tuple[str, str], float], asked: Sequence[str]
    ) -> rolling.Shelves:
        return rolling.Shelves(self.versions, self.budget, used, asked, self.refused, self._moving)

    def _size(self, key: str) -> int:
        return self.versions[key].size if key in self.versions else 0

    def _lineage(self, key: str) -> str:
        return self.versions[key].lineage if key in self.versions else ""
