"""Square losses of latents [B, F, C, H, W] and what weighs them: noise levels, edited cells.

All arithmetic is float32 and all results are scalars.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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


def regression_loss(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """0.5 * mean square error, on the scale of `dmd.gradient_as_loss`; weights as velocities'."""
    return 0.5 * _weighted_square(x, target, weight)


def _weighted_square(x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    error = (x.float() - target.float()).square()  # [B, F, C, H, W]
    if weight is None:
        return error.mean()
    return (error * weight.float().reshape(*weight.shape, *(1,) * (5 - weight.dim()))).mean()
