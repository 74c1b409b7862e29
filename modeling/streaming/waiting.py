"""Frames that wait for their chunk to be complete, as they came.

n frames, uint8 [n, H, W, 3] on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PendingFrames:
    """Frames of one size, first in, first out. Copied once, however many pieces they come in."""

    def __init__(self, height: int, width: int) -> None:
        self._none = torch.empty(0, height, width, 3, dtype=torch.uint8)
        self._pieces: list[Tensor] = []

    def __len__(self) -> int:
        return sum(len(piece) for piece in self._pieces)

    def add(self, frames: Tensor) -> None:
        """A copy, because a camera writes its next frames where these lie."""
        self._pieces.append(frames.clone())

    def between(self, first: int, stop: int) -> Tensor:
        """Those frames; where they came in one piece they are not copied."""
        found = _between(self._pieces, first, stop)
        return found[0] if len(found) == 1 else torch.cat([self._none, *found])

    def drop(self, count: int) -> None:
        """Forget the first ones."""
        self._pieces = _between(self._pieces, count, len(self))


def _between(pieces: list[Tensor], first: int, stop: int) -> list[Tensor]:
    parts, at = [], 0
    for piece in pieces:
        parts.append(piece[max(first - at, 0) : max(stop - at, 0)])
        at += len(piece)
    return [part for part in parts if len(part)]
