"""The mask cache: recompute the tokens that the edit changes, reuse the others.

In the pruned steps only the tokens that a policy (`policies.POLICIES`) keeps are recomputed. Most
policies read them off the chunk before: where its edited latents differ most from the source. A
pruned token then skips self-attention (`scope="attention"`: its output of the last full step stands
in, as published), the feed-forward layer (`scope="feedforward"`: likewise) or the whole transformer
(`scope="block"`: its clean estimate of the step before stands in). A policy that follows
(`streaming.follow`) reads them off the first step of the chunk itself; what it does not keep is not
edited, so it skips the whole transformer and the source stands in: how many tokens that are is the
picture's business, from none to all. One that settles (`streaming.settled`) chooses anew after
every step, all tokens or none: when a chunk has stopped moving its own estimate stands in.

B batch, F latents of a chunk, C channels, H x W latent size, K kept tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modeling.config import MaskCacheConfig, TransformerConfig
from modeling.diffusion.reuse import Reuse
from modeling.geometry import PATCH
from modeling.streaming import follow
from modeling.streaming.policies import POLICIES
from modeling.streaming.settled import Settled


class MaskCache:
    """The mask cache of one stream: which tokens this chunk keeps, and what it reuses."""

    def __init__(
        self,
        config: MaskCacheConfig,
        transformer: TransformerConfig,
        *,
        chunk_latents: int,
        latent_height: int,
        latent_width: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.policy = POLICIES[config.policy]
        self.grid = (chunk_latents, latent_height // PATCH, latent_width // PATCH)
        self.token_count = self.grid[0] * self.grid[1] * self.grid[2]
        stored = 0 if config.scope == "block" else transformer.num_layers
        self._outputs = torch.zeros(
            stored, 1, self.token_count, transformer.dim, device=device, dtype=dtype
        )
        self.tokens: Tensor | None = None  # [K]; None recomputes all, as in a stream's first chunk
        # Of a policy that follows: the last latent's undilated mask [h, w], and its source
        self._before: Tensor | None = None
        self._source: Tensor | None = None
        self._settled = Settled(config.threshold) if self.policy.settles else None
        self._computed = 1  # steps of this chunk, by a policy that settles

    @property
    def follows(self) -> bool:
        """Whether what is not edited is told from a chunk's own first step."""
        return self.policy.follows

    def new_prompt(self) -> None:
        """What was edited by the old prompt says nothing about the new one."""
        if self.follows:
            self._before = self._source = None
        if self._settled:
            self._settled.forget()

    def carried(self) -> Tensor | None:
        """What goes from one chunk to the next, as indices of tokens: part of a stream's state."""
        if not self.policy.asked_within:
            return self.tokens
        if self._settled:
            moves = self._settled.moves
            return None if moves is None else torch.arange(self.token_count if moves else 0)
        return None if self._before is None else self._before.flatten().nonzero().squeeze(1)

    def carry_on(self, tokens: Tensor | None, source: Tensor | None, chunks: int) -> None:
        """Go on where `carried` gave `tokens` after `chunks` chunks, and the last source latent was
        [C, H, W]."""
        if not self.policy.asked_within:
            self.tokens = tokens
            return
        if self._settled:
            self._settled.carry_on(None if tokens is None else len(tokens) > 0, source, chunks)
        elif tokens is not None and source is not None:
            self._before, self._source = self._mask(tokens, self.grid[1:]), source.half()

    def settle(self, step: int, estimate: Tensor, before: Tensor, source: Tensor) -> Tensor:
        """The clean latents after `step`, from its estimate, those before it and the source, all
        [1, F, C, H, W]: what is not recomputed is replaced by what stands in for it."""
        if self.follows:
            if step == 0:
                self._choose(estimate, source)
            return estimate if self.tokens is None else self._among(estimate, source)
        if self._settled:
            return self._settle(self._settled, step, estimate, before, source)
        if self.tokens is None or self.config.scope != "block":
            return estimate
        return self._among(estimate, before) if step in self.config.pruned_steps else estimate

    def _among(self, estimate: Tensor, others: Tensor) -> Tensor:
        return torch.where(self.cell_mask(), estimate, others)

    def _settle(
        self, settled: Settled, step: int, estimate: Tensor, before: Tensor, source: Tensor
    ) -> Tensor:
        if step == 0:
            self._computed, goes_on = 1, settled.begin(source[0])
        else:
            if self.tokens is not None and step in self.config.pruned_steps:
                return before  # of a rollout, which computes a step all the same
            self._computed += 1
            goes_on = settled.moved(step, estimate[0], before[0])
        nothing = torch.empty(0, dtype=torch.long, device=estimate.device)
        self.tokens = None if goes_on else nothing
        return estimate

    def _choose(self, estimate: Tensor, source: Tensor) -> None:
        before = self._before
        if self._source is not None and follow.is_cut(self._source, source[0, 0]):
            before = None
        found = follow.undilated(estimate[0], source[0], before, threshold=self.config.threshold)
        kept = follow.grow(found, self.config.dilate)
        self._before, self._source = found[-1], source[0, -1].half()
        self.tokens = None if kept.all() else kept.flatten().nonzero().squeeze(1)

    def reuse(self, step: int) -> Reuse | None:
        """What step `step` of the current chunk reuses or keeps; None leaves it plain and dense."""
        if self.tokens is None or (self.policy.asked_within and step == 0):
            return None
        if step in self.config.pruned_steps:
            return self._reuse(self.tokens, fixed_size=self.policy.fixed_size)
        if self.config.scope != "block" and step + 1 in self.config.pruned_steps:
            return self._reuse(None, fixed_size=True)
        return None

    def _reuse(self, tokens: Tensor | None, *, fixed_size: bool) -> Reuse:
        return Reuse(self.config.scope, self._outputs, tokens, fixed_size=fixed_size)

    def observe(self, edited: Tensor, source: Tensor) -> None:
        """Choose the next chunk's tokens from this chunk's latents [1, F, C, H, W]."""
        if self.policy.choose is None:
            return
        importance = (edited.float() - source.float()).square().mean(dim=2)[0]  # [F, H, W]
        self.tokens = self.policy.choose(importance, self.config.keep_ratio)

    def let_go(self) -> None:
        """Leave what a backward pass will read as it is: what comes is written elsewhere."""
        self._outputs = torch.empty_like(self._outputs)

    def token_mask(self) -> Tensor:
        """Recomputed tokens of a pruned step, bool [F, H/2, W/2]."""
        mask = torch.ones(self.grid, dtype=torch.bool, device=self._outputs.device)
        if self._settled:
            return mask if self._computed > 1 else ~mask
        return mask if self.tokens is None else self._mask(self.tokens, self.grid)

    @staticmethod
    def _mask(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
        mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=tokens.device)
        return mask.index_fill(0, tokens, True).view(shape)

    def cell_mask(self) -> Tensor:
        """`token_mask` over latent cells, bool [1, F, 1, H, W]."""
        mask = self.token_mask().repeat_interleave(PATCH, dim=1).repeat_interleave(PATCH, dim=2)
        return mask[None, :, None]

    def recomputed(self, steps: int) -> float:
        """Share of tokens recomputed over the `steps` denoising forwards and the refresh."""
        if self._settled:
            return (self._computed + 1) / (steps + 1)
        pruned = len(self.config.pruned_steps)
        kept = self.token_count if self.tokens is None else len(self.tokens)
        return (steps + 1 - pruned * (1 - kept / self.token_count)) / (steps + 1)
