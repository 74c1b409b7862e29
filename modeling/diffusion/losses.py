"""The losses of the trained stages, as pure functions.

Latents are [B, F, C, H, W], pixels [B, f, 3, H, W] in [-1, 1]. All arithmetic is float32 and all
results are scalars.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from modeling.diffusion.flow import FlowSchedule
from modeling.tables import Table


def uniform(schedule: FlowSchedule, timestep: Tensor) -> Tensor:
    """All noise levels alike."""
    return torch.ones_like(timestep, dtype=torch.float32)


def published(schedule: FlowSchedule, timestep: Tensor) -> Tensor:
    return schedule.loss_weight(timestep)


# What a clip's loss counts at its noise level: timesteps [B] or [B, F] -> weights of that shape.
WEIGHTINGS: Table[Callable[[FlowSchedule, Tensor], Tensor]] = Table(
    "weighting", {"uniform": uniform, "published": published}
)


def velocity_loss(predicted: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Flow matching: mean square error of velocities, each place times its `weight`.

    `weight` is [B], one a clip, [B, F], one a latent, or [B, F, 1, H, W], one a cell; None weighs
    all alike.
    """
    return _weighted_square(predicted, target, weight)


def edit_weight(source: Tensor, target: Tensor, weight: float, full: float = 1.0) -> Tensor:
    """1 for cells that the edit leaves alone, up to 1 + `weight` for others: [B, F, 1, H, W].

    The change is the mean square over channels of target - source; from `full` on it counts whole.
    An edit is a small part of a clip, and copying the rest alone makes most of an unweighted loss;
    a gentle edit (light from a side) changes cells by far less than 1.
    """
    change = (target.float() - source.float()).square().mean(dim=2, keepdim=True)
    return 1 + weight * (change / full).clamp_max(1)


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


def regression_loss(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """0.5 * mean square error, on the same scale as `gradient_as_loss`; weights as velocities'."""
    return 0.5 * _weighted_square(x, target, weight)


def reconstruction_loss(
    pixels: Tensor, target: Tensor, edge_weight: float, square_weight: float = 0.0
) -> Tensor:
    """L1 of pixels, plus `edge_weight` times the L1 of differences of neighbouring pixels, plus
    `square_weight` times the mean square error.

    The second term keeps edges sharp, which L1 alone trades for smoothness; the third weighs the
    large errors of fine texture, which natural pictures are full of.
    """
    error = pixels.float() - target.float()
    loss = error.abs().mean()
    if edge_weight:
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + edge_weight * edges
    if square_weight:
        loss = loss + square_weight * error.square().mean()
    return loss


def scale_penalty(latents: Tensor) -> Tensor:
    """Half the mean square of latents: the mean's part of the KL divergence from N(0, 1)."""
    return 0.5 * latents.float().square().mean()


def _weighted_square(x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    error = (x.float() - target.float()).square()  # [B, F, C, H, W]
    if weight is None:
        return error.mean()
    return (error * weight.float().reshape(*weight.shape, *(1,) * (5 - weight.dim()))).mean()
