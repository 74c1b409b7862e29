"""The loss that matches distributions (DMD): a gradient between two scores' clean estimates.

Latents are [B, F, C, H, W]; all arithmetic is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss


def guided(conditional: Tensor, unconditional: Tensor, excess: float) -> Tensor:
    """conditional + excess * (conditional - unconditional); `excess` 3 is guidance scale 4."""
    return conditional + excess * (conditional - unconditional)


def dmd_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Direction from the real to the fake score's clean estimate, normalised a sample (DMD).

    (fake - real) / mean|x - real|, so that samples weigh alike however far they are off; where
    `real` is `x` itself the direction is 0.
    """
    x, real, fake = x.float(), real.float(), fake.float()
    distance = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return ((fake - real) / distance.clamp_min(torch.finfo(torch.float32).tiny)).where(
        distance > 0, torch.zeros_like(x)
    )


def gradient_as_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient in `x` is gradient / x.numel(): 0.5 * MSE(x, stopgrad(x - g))."""
    x = x.float()
    return 0.5 * mse_loss(x, (x - gradient).detach())
