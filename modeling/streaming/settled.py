"""The tokens whose clean estimate still moves from step to step; the others have settled.

Where a step moved a token's estimate by less than a threshold, the next would as well, so its
estimate stands and it is computed no more in this chunk. What the second step would move is known
from the chunk before: only what moved there, and what lies around it, is tried again. So that a
token which begins to move is found, every `PROBE`-th chunk tries all of them, as do the first one,
one with a new prompt, and one with a scene cut.

A step draws new noise, so an estimate always trembles; as for an edit (`streaming.follow`), what
counts is a neighbourhood that moves one way.

F latents of a chunk, C channels, H x W latent size, h x w tokens of a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.streaming.follow import evidence, grow, is_cut

PROBE = 8  # chunks


class Settled:
    """What one stream knows of its moving tokens.

    `moving` are those of the chunk before, bool [h, w], in any of its latents; None if it says
    nothing about this one. `chunk` counts them.
    """

    def __init__(self, threshold: float, dilate: int) -> None:
        self.threshold, self.dilate = threshold, dilate
        self.moving: Tensor | None = None
        self.chunk = 0
        self._source: Tensor | None = None  # of the last latent

    def forget(self) -> None:
        """What moved by the old prompt says nothing about the new one."""
        self.moving = None

    def carry_on(self, moving: Tensor | None, source: Tensor | None, chunk: int) -> None:
        """Go on where another one was: its `moving`, last source latent [C, H, W], and `chunk`."""
        self.moving, self.chunk = moving, chunk
        self._source = None if source is None else source.half()

    def begin(self, source: Tensor) -> Tensor | None:
        """Which tokens the second step of a chunk tries, bool [F, h, w], from its source latents
        [F, C, H, W]; None for all."""
        before = source[0] if self._source is None else self._source
        scenes = torch.cat([before[None].to(source), source]).unbind()
        if any(is_cut(*pair) for pair in zip(scenes, scenes[1:], strict=False)):
            self.moving = None
        probes = self.chunk % PROBE == 0
        self.chunk += 1
        self._source = source[-1].half()
        return None if probes or self.moving is None else self.moving.expand(len(source), -1, -1)

    def moved(self, step: int, estimate: Tensor, before: Tensor) -> Tensor:
        """Which tokens the next step tries, bool [F, h, w], from the estimates [F, C, H, W] of
        `step`, from 1, and of the one before it."""
        moved = grow(evidence(estimate, before) > self.threshold, self.dilate)
        if step == 1:
            self.moving = moved.any(dim=0)
        return moved
