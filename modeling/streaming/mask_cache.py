"""The mask cache: recompute the tokens that the edit changes, reuse the others.

Which tokens change is read off the chunk before: where its edited latents differ most from the
source. A policy turns that importance into a list of kept tokens; in the pruned steps only these
are recomputed. A pruned token skips self-attention (`scope="attention"`: its output of the last
full step stands in, as published) or the whole transformer (`scope="block"`: its clean estimate of
the step before stands in).

Policies, both for latents [1, F, C, H, W] and tokens of 2 x 2 latent cells:
- `published`: LiveEdit's. The top `keep_ratio` cells of each latent; a token survives with at
  least 3 of its 4 cells; lists are cut in raster order to the shortest of the chunk's latents, so
  thin or scattered edits keep fewer tokens than asked for.
- `budget`: the top `keep_ratio` tokens of the chunk by their most important cell, after a 3 x 3
  maximum that lets a moving edit be found at its border. Always exactly the same number of tokens.

B batch, F latents of a chunk, T tokens of a chunk, K kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling.presets import MaskCacheConfig, TransformerConfig


class Reuse:
    """What one forward recomputes (`tokens`, [K], None for all) and where it keeps its outputs.

    `outputs` [layers, B, T, dim] holds each layer's self-attention output before its gate. With a
    policy of `fixed_size` all chunks keep equally many tokens, listed at the same place in memory.
    """

    def __init__(self, config: MaskCacheConfig, outputs: Tensor, tokens: Tensor | None) -> None:
        self.scope = config.scope
        self.tokens = tokens
        self.fixed_size = tokens is None or config.policy == "budget"
        self._outputs = outputs

    def exchange(self, layer: int, output: Tensor) -> Tensor:
        """Self-attention outputs of the tokens computed, [B, T or K, dim], to those of all T.

        A dense step's outputs are stored; a pruned step's are put among the stored ones, which
        stay as they are.
        """
        if self.tokens is None:
            self._outputs[layer] = output
            return output
        return self._outputs[layer].index_copy(1, self.tokens, output)


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
        self.grid = (chunk_latents, latent_height // 2, latent_width // 2)
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
            return Reuse(self.config, self._outputs, self.tokens)
        if self.config.scope == "attention" and step + 1 in self.config.pruned_steps:
            return Reuse(self.config, self._outputs, None)
        return None

    def observe(self, edited: Tensor, source: Tensor) -> None:
        """Choose the next chunk's tokens from this chunk's latents [1, F, C, H, W]."""
        importance = (edited.float() - source.float()).square().mean(dim=2)[0]  # [F, H, W]
        choose = published_tokens if self.config.policy == "published" else budget_tokens
        tokens = choose(importance, self.config.keep_ratio)
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
        mask = self.token_mask().repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        return mask[None, :, None]

    def recomputed(self, steps: int) -> float:
        """Share of tokens recomputed over the `steps` denoising forwards and the refresh."""
        pruned = len([s for s in self.config.pruned_steps if s < steps])
        kept = self.token_count if self.tokens is None else len(self.tokens)
        return (steps + 1 - pruned * (1 - kept / self.token_count)) / (steps + 1)


def published_tokens(importance: Tensor, keep_ratio: float) -> Tensor:
    """LiveEdit's rule on importance [F, H, W] -> token indices [K] of the chunk, rising."""
    frames, height, width = importance.shape
    flat = importance.flatten(1)
    keep = int(flat.shape[1] * keep_ratio)
    if keep == 0:
        return torch.empty(0, dtype=torch.long, device=importance.device)
    threshold = flat.kthvalue(flat.shape[1] - keep + 1, dim=1).values
    cells = _cut_to_shortest(flat >= threshold[:, None]).view(frames, 1, height, width)
    tokens = F.avg_pool2d(cells.float(), 2) > 0.5
    return _cut_to_shortest(tokens.flatten(1)).flatten().nonzero().squeeze(1)


def budget_tokens(importance: Tensor, keep_ratio: float) -> Tensor:
    """The `keep_ratio` most important tokens of importance [F, H, W] -> indices [K], rising."""
    spread = F.max_pool2d(importance[:, None], 3, stride=1, padding=1)
    tokens = F.max_pool2d(spread, 2).flatten()
    keep = max(1, round(len(tokens) * keep_ratio))
    return tokens.topk(keep).indices.sort().values


def _cut_to_shortest(kept: Tensor) -> Tensor:
    """Rows of bool [F, n] with as many True as the shortest has, dropping the tail of each."""
    return kept & (kept.cumsum(dim=1) <= kept.sum(dim=1).min())
