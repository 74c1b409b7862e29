"""Steps that would move nothing are left out, for the whole chunk.

Where a step hardly moved the clean estimate of a chunk, the next would not either, so the estimate
stands and the chunk is done. Whether its second step moves anything is known from the chunk before.
So that a scene which begins to move is found, every `PROBE`-th chunk computes it all the same, as
do the first one, one with a new prompt, and one with a scene cut.

Chunks, not tokens: tokens that are computed alone do not see the rest of their chunk, and their
estimates then differ for that reason.

A step draws new noise, so an estimate always trembles; as for an edit (`streaming.follow`), what
counts is a neighbourhood that moves one way.

F latents of a chunk, C channels, H x W latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.streaming.follow import CUT, evidence

PROBE = 8  # chunks
# Times the usual change of a chunk from latent to latent that a cut is: where the camera moves fast
# all of them are as large as a cut.
STANDS_OUT = 2.0
SHARE = 0.02  # of the tokens; where no more than that moved, a chunk has settled


class Settled:
    """What one stream knows of its steps.

    `moves` says whether the second step of the chunk before moved anything; None if that says
    nothing about this one. `chunk` counts them.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.moves: bool | None = None
        self.chunk = 0
        self._source: Tensor | None = None  # of the last latent

    def forget(self) -> None:
        """What moved by the old prompt says nothing about the new one."""
        self.moves = None

    def carry_on(self, moves: bool | None, source: Tensor | None, chunk: int) -> None:
        """Go on where another one was: its `moves`, last source latent [C, H, W], and `chunk`."""
        self.moves, self.chunk = moves, chunk
        self._source = None if source is None else source.half()

    def begin(self, source: Tensor) -> bool:
        """Whether a chunk with these source latents [F, C, H, W] needs its second step."""
        before = source[0] if self._source is None else self._source
        if _has_cut(torch.cat([before[None].to(source), source])):
            self.moves = None
        probes = self.chunk % PROBE == 0
        self.chunk += 1
        self._source = source[-1].half()
        return probes or self.moves is None or self.moves

    def moved(self, step: int, estimate: Tensor, before: Tensor) -> bool:
        """Whether the next step is needed after `step`, from 1, which made this estimate
        [F, C, H, W] of the one before it."""
        moved = evidence(estimate, before) > self.threshold
        moves = bool(moved.float().mean() > SHARE)
        if step == 1:
            self.moves = moves
        return moves


def _has_cut(source: Tensor) -> bool:
    """Whether a scene ends within successive source latents [n, C, H, W]."""
    changes = (source[1:] - source[:-1]).square().mean(dim=(1, 2, 3))
    return bool(changes.max() > (STANDS_OUT * changes.median()).clamp(min=CUT))
