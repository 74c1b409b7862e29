"""The mask cache: recompute the tokens that the edit changes, reuse the others.

Which tokens change is read off the chunk before: where its edited latents differ most from the
source. A policy (`policies.POLICIES`) turns that importance into a list of kept tokens; in the
pruned steps only these are recomputed. A pruned token skips self-attention (`scope="attention"`:
its output of the last full step stands in, as published) or the whole transformer (`scope="block"`:
its clean estimate of the step before stands in).

B batch, F latents of a chunk, C channels, H x W latent size, K kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.config import MaskCacheConfig, TransformerConfig
from modeling.diffusion.reuse import Reuse
from modeling.geometry import PATCH
from modeling.streaming.policies import POLICIES


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
        stored = transformer.num_layers if config.scope == "attention" else 0
        self._outputs = torch.zeros(
            stored, 1, self.token_count, transformer.dim, device=device, dtype=dtype
        )
        self.tokens: Tensor | None = None  # [K]; None recomputes all, as in a stream's first chunk

    def reuse(self, step: int) -> Reuse | None:
        """What step `step` of the current chunk reuses or keeps; None leaves it plain and dense."""
        if self.tokens is None:
            return None
        if step in self.config.pruned_steps:
            return self._reuse(self.tokens, fixed_size=self.policy.fixed_size)
        if self.config.scope == "attention" and step + 1 in self.config.pruned_steps:
            return self._reuse(None, fixed_size=True)
        return None

    def _reuse(self, tokens: Tensor | None, *, fixed_size: bool) -> Reuse:
        return Reuse(self.config.scope, self._outputs, tokens, fixed_size=fixed_size)

    def observe(self, edited: Tensor, source: Tensor) -> None:
        """Choose the next chunk's tokens from this chunk's latents [1, F, C, H, W]."""
        importance = (edited.float() - source.float()).square().mean(dim=2)[0]  # [F, H, W]
        tokens = self.policy.choose(importance, self.config.keep_ratio)
        if self.tokens is not None and len(self.tokens) == len(tokens):
            self.tokens.copy_(tokens)  # in place: a captured CUDA graph reads them here
        else:
            self.tokens = tokens

    def token_mask(self) -> Tensor:
        """Recomputed tokens of a pruned step, bool [F, H/2, W/2]."""
        mask = torch.ones(self.token_count, dtype=torch.bool, device=self._outputs.device)
        if self.tokens is not None:
            mask = torch.zeros_like(mask).index_fill(0, self.tokens, True)
        return mask.view(self.grid)

    def cell_mask(self) -> Tensor:
        """`token_mask` over latent cells, bool [1, F, 1, H, W]."""
        mask = self.token_mask().repeat_interleave(PATCH, dim=1).repeat_interleave(PATCH, dim=2)
        return mask[None, :, None]

    def recomputed(self, steps: int) -> float:
        """Share of tokens recomputed over the `steps` denoising forwards and the refresh."""
        pruned = len([s for s in self.config.pruned_steps if s < steps])
        kept = self.token_count if self.tokens is None else len(self.tokens)
        return (steps + 1 - pruned * (1 - kept / self.token_count)) / (steps + 1)
