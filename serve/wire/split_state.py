"""A stream's state as it travels: whole once, and from then on what is new in it.

Nearly all of a compact state are the latents of a few chunks, of which each chunk replaces one. So
they go as parts with names of their own, and who has the state before is not sent what that one
holds as well. A part's name follows from its bytes, so whoever made them, parts of one name
are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace


class LostPartError(Exception):
    """A state names a part that neither came with it nor is in the one before."""


@dataclass(frozen=True)
class HistoryPart:
    name: str
    data: bytes

    @classmethod
    def of(cls, data: bytes) -> HistoryPart:
        return cls(hashlib.blake2b(data, digest_size=16).hexdigest(), data)


@dataclass(frozen=True)
class SplitState:
    """All but the `rest` are the parts called `names`, in this order; `parts` are those of
    them that are here, each once."""

    rest: bytes
    names: tuple[str, ...] = ()
    parts: tuple[HistoryPart, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of what is here."""
        return len(self.rest) + sum(len(part.data) for part in self.parts)

    def beyond(self, names: Collection[str]) -> SplitState:
        """Without the parts of these names."""
        return replace(self, parts=tuple(s for s in self.parts if s.name not in names))

    def completed(self, before: SplitState | None) -> SplitState:
        """With all its parts, those that did not come taken from the whole state `before`.

        Raises LostPartError.
        """
        found = {s.name: s for s in (*(before.parts if before else ()), *self.parts)}
        try:
            # Each name once, at its first place.
            parts = tuple(found[name] for name in dict.fromkeys(self.names))
        except KeyError as error:
            raise LostPartError(f"a state without its part {error}") from None
        return replace(self, parts=parts)
