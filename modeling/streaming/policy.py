"""What a mask-cache policy is, and two that read importance off the chunk before.

They choose tokens of 2 x 2 latent cells:
- `published`: LiveEdit's. The top `keep_ratio` cells of each latent; a token survives with at
  least 3 of its 4 cells; lists are cut in raster order to the shortest of the chunk's latents, so
  thin or scattered edits keep fewer tokens than asked for.
- `budget`: the top `keep_ratio` tokens of the chunk by their most important cell, after a 3 x 3
  maximum that lets a moving edit be found at its border. Always exactly the same number of tokens.

F latents of a chunk, H x W latent size, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling.geometry import PATCH


def published_tokens(importance: Tensor, keep_ratio: float) -> Tensor:
    """LiveEdit's rule on importance [F, H, W] -> token indices [K] of the chunk, rising."""
    frames, height, width = importance.shape
    flat = importance.flatten(1)
    keep = int(flat.shape[1] * keep_ratio)
    if keep == 0:
        return torch.empty(0, dtype=torch.long, device=importance.device)
    threshold = flat.kthvalue(flat.shape[1] - keep + 1, dim=1).values
    cells = _cut_to_shortest(flat >= threshold[:, None]).view(frames, 1, height, width)
    tokens = F.avg_pool2d(cells.float(), PATCH) > 0.5
    return _cut_to_shortest(tokens.flatten(1)).flatten().nonzero().squeeze(1)


def budget_tokens(importance: Tensor, keep_ratio: float) -> Tensor:
    """The `keep_ratio` most important tokens of importance [F, H, W] -> indices [K], rising."""
    spread = F.max_pool2d(importance[:, None], 3, stride=1, padding=1)
    tokens = F.max_pool2d(spread, PATCH).flatten()
    keep = max(1, round(len(tokens) * keep_ratio))
    return tokens.topk(keep).indices.sort().values


def _cut_to_shortest(kept: Tensor) -> Tensor:
    """Rows of bool [F, n] with as many True as the shortest has, dropping the tail of each."""
    return kept & (kept.cumsum(dim=1) <= kept.sum(dim=1).min())


@dataclass(frozen=True)
class Policy:
    """`choose(importance [F, H, W], keep_ratio)` gives the kept tokens' indices [K], rising; None
    for a policy that is asked within the chunk: one that `follows` or `settles`.

    `fixed_size`: K depends on `keep_ratio` and the chunk's size alone, so that one CUDA graph
    serves all chunks.
    """

    choose: Callable[[Tensor, float], Tensor] | None
    fixed_size: bool
    follows: bool = False
    settles: bool = False

    @property
    def asked_within(self) -> bool:
        """Whether the tokens of a chunk are chosen while it is denoised."""
        return self.choose is None
