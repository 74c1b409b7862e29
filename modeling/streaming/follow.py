"""The mask that follows the chunk: what its own first step changes, and nothing else, is edited.

The first of a chunk's steps computes every token, so its clean estimate already says where the
edit is, in this chunk and not the one before. An edit moves a whole neighbourhood one way, the
noise of an estimate does not, so what counts is the difference of estimate and source averaged
over neighbouring tokens. Two thresholds (as in Canny's edges): a token above the upper one is
edited; one above the lower one is, if it was in the latent before or lies beside an edited one. The
mask is then widened, for borders and for what the first step did not see yet.

F latents of a chunk, C channels, H x W latent size, h x w tokens of a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling.geometry import PATCH

LOWER = 0.5  # of the upper threshold
SINGLE = 0.25  # what a single token counts beside its neighbourhood: it is noisier
# Mean square difference of two latents from which they show two scenes; independent pictures of
# standardised latents differ by 2.
CUT = 1.0


def evidence(estimate: Tensor, source: Tensor) -> Tensor:
    """How far each token's neighbourhood is moved: latents [F, C, H, W] -> [F, h, w], mean square
    of the difference averaged over the token and over 3 x 3 tokens, whichever is more edited."""
    tokens = F.avg_pool2d((estimate - source).float(), PATCH)  # [F, C, h, w]
    around = F.avg_pool2d(tokens, 3, stride=1, padding=1, count_include_pad=False)
    return torch.maximum(around.square().mean(dim=1), SINGLE * tokens.square().mean(dim=1))


def undilated(
    estimate: Tensor, source: Tensor, before: Tensor | None, *, threshold: float
) -> Tensor:
    """Tokens that the edit changes, not widened yet: bool [F, h, w], from latents [F, C, H, W].

    `before` is the answer for the latent before the first, bool [h, w]; None after a cut.
    """
    moved = evidence(estimate, source)
    sure, likely = moved > threshold, moved > LOWER * threshold
    latents: list[Tensor] = []
    for n in range(len(moved)):
        cut = n > 0 and is_cut(source[n - 1], source[n])
        last = None if cut else (latents[-1] if latents else before)
        seeds = sure[n] if last is None else sure[n] | last
        latents.append(sure[n] | (likely[n] & grow(seeds[None], 1)[0]))
    return torch.stack(latents)


def is_cut(before: Tensor, after: Tensor) -> bool:
    """Whether two successive source latents [C, H, W] show two scenes."""
    return bool((after.float() - before.float()).square().mean() > CUT)


def grow(mask: Tensor, tokens: int) -> Tensor:
    """bool [F, h, w] with `tokens` added on every side."""
    if not tokens:
        return mask
    size = 2 * tokens + 1
    return F.max_pool2d(mask[:, None].float(), size, stride=1, padding=tokens)[:, 0].bool()
