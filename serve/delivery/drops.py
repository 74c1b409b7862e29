"""The source frames that a live session left out, and which of them its client knows of."""

from __future__ import annotations

from collections.abc import Iterable

Stretch = tuple[int, int]  # of source frames: first and count


class Drops:
    """`told` are those that the client was told of, in a resumed session by another front."""

    def __init__(self, told: Iterable[Stretch] = ()) -> None:
        self.count = 0  # of this front's
        self.told = list(told)
        self._new: list[Stretch] = []

    def add(self, index: int) -> None:
        first, count = self._new[-1] if self._new else (index, 0)
        if first + count == index:
            self._new[-1:] = [(first, count + 1)]
        else:
            self._new.append((index, 1))
        self.count += 1

    @property
    def untold(self) -> int:
        return sum(count for _, count in self._new)

    def tell(self) -> list[Stretch]:
        """Those that the client does not know of, which from now on it does."""
        new, self._new = self._new, []
        self.told += new
        return new

    def known(self, index: int) -> bool:
        return any(first <= index < first + count for first, count in self.told)

    def told_from(self, frame: int) -> list[Stretch]:
        """Those that the client knows of from source frame `frame` on; the others are forgotten."""
        self.told = [(first, count) for first, count in self.told if first + count > frame]
        return list(self.told)
