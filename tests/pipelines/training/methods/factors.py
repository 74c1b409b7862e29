"""Distribution matching between networks that are sums of their inputs with known factors."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.diffusion.flow import FlowSchedule
from pipelines.training.methods.base import Setting
from pipelines.training.methods.distill import DistillTraining
from tests.pipelines.training.plain import (
    CONFIG,
    Call,
    PlainNetwork,
    model,
    over,
)

TEACHER = (0.4, -0.2, 0.5, 0.8)


CRITIC = (0.1, 0.3, -0.6, -0.5)


GENERATOR = (0.6, -0.5, 0.2, 0.1)


GRID = FlowSchedule(CONFIG.stream.shift).timesteps.double()


def make(here: Setting) -> DistillTraining:
    """With a critic that has learned something of its own."""
    training = DistillTraining(here, model(PlainNetwork(*GENERATOR)))
    with torch.no_grad():
        training.critic.module.factors.copy_(torch.tensor(CRITIC))
    return training


def sigma_of(timestep: Tensor) -> Tensor:
    """The level on the stream's grid that is nearest to a timestep [B]."""
    return GRID[(timestep.double()[:, None] - GRID).abs().argmin(dim=1)] / 1000


def noise_in(call: Call, made: Tensor) -> Tensor:
    sigma = over(sigma_of(call.timestep), made)
    return (call.noisy.double() - (1 - sigma) * made.double()) / sigma


def clean(factors: tuple[float, ...], call: Call, text: Tensor) -> Tensor:
    """x0 = noisy - sigma * velocity, in float64."""
    a, b, c, d = factors
    noisy, source = call.noisy.double(), call.source.double()
    said = over(text.double().mean(dim=(1, 2)), noisy)
    velocity = a * noisy + b * source + c * said + d * over(call.timestep.double() / 1000, noisy)
    return noisy - over(sigma_of(call.timestep), noisy) * velocity
