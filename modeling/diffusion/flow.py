"""Rectified flow on a shifted grid of 1000 noise levels (Wan2.1, Self-Forcing).

x_sigma = (1 - sigma) * x0 + sigma * noise, and the network predicts v = noise - x0. Level u of the
uniform grid 1, 0.999, ..., 0.001 becomes sigma = s * u / (1 + (s - 1) * u) under shift s; the
timestep is 1000 * sigma.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GRID = 1000


class FlowSchedule:
    """Noise levels, conversions and weights for one `shift` (>= 1; 1 leaves the grid uniform).

    Timesteps are handed in on the 0..1000 scale, of shape [B] or [B, F], and snap to the nearest
    grid entry. Latents are [B, F, C, H, W]. Arithmetic is float32 whatever the latents' type.
    """

    def __init__(self, shift: float, device: torch.device | str = "cpu") -> None:
        if shift <= 0:
            raise ValueError(f"flow shift {shift} must be positive")
        u = torch.arange(GRID, 0, -1, dtype=torch.float64) / GRID
        sigmas = shift * u / (1 + (shift - 1) * u)
        weights = torch.exp(-2 * ((1000 * sigmas - 500) / 1000) ** 2)
        weights = weights - weights.min()
        self.shift = shift
        self.sigmas = sigmas.float().to(device)  # [1000], falling from 1
        self.timesteps = (1000 * sigmas).float().to(device)  # [1000]
        self._weights = (weights * GRID / weights.sum()).float().to(device)

    def warp(self, places: Sequence[int]) -> Tensor:
        """Timesteps at `places` of the unshifted grid: 1000 is pure noise, 0 would be clean."""
        for place in places:
            if not 0 < place <= GRID:
                raise ValueError(f"timestep place {place} is outside 1..{GRID}")
        return self.timesteps[[GRID - place for place in places]]

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise level of the grid entry nearest to each timestep; the shape is kept."""
        return self.sigmas[self._nearest(timestep)]

    def loss_weight(self, timestep: Tensor) -> Tensor:
        """Published weight of the velocity loss: a bell around t = 500, averaging 1 on the grid."""
        return self._weights[self._nearest(timestep)]

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        sigma = _over_frames(self.sigma(timestep), x0)
        return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)

    def to_x0(self, x_t: Tensor, velocity: Tensor, timestep: Tensor) -> Tensor:
        sigma = _over_frames(self.sigma(timestep), x_t)
        return (x_t.float() - sigma * velocity.float()).to(x_t.dtype)

    def _nearest(self, timestep: Tensor) -> Tensor:
        distance = (timestep.float().unsqueeze(-1) - self.timesteps).abs()
        return distance.argmin(dim=-1)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the network is trained to predict: noise - x0."""
    return noise - x0


def _over_frames(value: Tensor, latents: Tensor) -> Tensor:
    """[B] or [B, F] -> a shape that broadcasts over latents [B, F, C, H, W]."""
    return value.reshape(*value.shape, *(1,) * (latents.dim() - value.dim()))
