"""Distill: four steps instead of fifty, by matching distributions (DMD) on self-forced rollouts.

Three networks: the generator streams over its own history (`rollout`), the real score is the
frozen foundation model with guidance, the fake score (critic) starts from it too and learns
what the generator makes. Where both scores agree the generator is done. The pairs also hold the
truth, so a regression term pulls towards it (the paper names one, its code has none).

`dmd_weight=0` leaves that term alone: regression on self-forced rollouts, without score networks.

One schedule with the stream's shift gives every sigma: noise, clean estimates and the critic's
target agree at all levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeling.diffusion.attention import bidirectional
from modeling.diffusion.flow import FlowSchedule, velocity
from modeling.diffusion.losses import (
    dmd_gradient,
    edit_weight,
    gradient_as_loss,
    guided,
    regression_loss,
    velocity_loss,
)
from modeling.diffusion.transformer import Transformer
from modeling.model_dir import Model, ModelError, load_model
from pipelines.training.average import Ema
from pipelines.training.engines import make_engine, update
from pipelines.training.methods.base import Draw, Exported, Setting, draw_timesteps
from pipelines.training.methods.rollout import exit_step, rollout


class DistillTraining:
    """See `base.Stage`."""

    def __init__(self, setting: Setting, model: Model) -> None:
        assert model.transformer is not None
        section, compute = setting.section, setting.config.compute
        self.setting, self.section = setting, section
        self.config, self.stream = model.config.transformer, model.config.stream
        self.schedule = FlowSchedule(self.stream.shift, setting.device)
        model.transformer.gradient_checkpointing = compute.activation_checkpointing
        self.generator = make_engine(model.transformer, compute, section, section.learning_rate)
        self.engines = {"generator": self.generator}
        self.learning_rates = {"generator": section.learning_rate}
        self.matches = section.dmd_weight > 0
        if self.matches:
            self.real = _teacher(setting)
            critic = _teacher(setting)
            critic.gradient_checkpointing = compute.activation_checkpointing
            self.critic = make_engine(critic, compute, section, section.critic_learning_rate)
            self.engines["critic"] = self.critic
            self.learning_rates["critic"] = section.critic_learning_rate
        self.average = Ema(self.generator, section.ema_decay)
        self.ema: Ema | None = self.average

    def step(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        device = self.setting.device
        source, target = batch["source"].to(device), batch["target"].to(device)  # [B, F, C, h, w]
        text = batch["text"].to(device)  # [B, L, D]
        metrics: dict[str, Tensor] = {}
        learns = not self.matches or draw.step % self.section.generator_every == 0
        made = self.edit(source, text, draw, learns)
        if learns:
            metrics |= self.train_generator(made, source, target, text, draw)
        if self.matches:
            metrics |= self.train_critic(made.detach(), source, text, draw)
        return metrics

    def edit(self, source: Tensor, text: Tensor, draw: Draw, learns: bool) -> Tensor:
        """The generator's clip [B, F, C, h, w], with gradient if it `learns`."""
        return rollout(
            self.generator if learns else None,
            self.generator.module,
            self.config,
            self.stream,
            self.schedule,
            source=source,
            text=text,
            last_step=exit_step(self.setting.seed, draw.step, len(self.stream.timesteps)),
            generator=draw.own,
            dtype=self.setting.dtype,
        )

    def train_generator(
        self, made: Tensor, source: Tensor, target: Tensor, text: Tensor, draw: Draw
    ) -> dict[str, Tensor]:
        section = self.section
        weight = edit_weight(source, target, section.edit_weight, section.edit_full)
        regression = regression_loss(made, target, weight)
        loss = section.regression_weight * regression
        metrics = {"regression_loss": regression}
        if self.matches:
            dmd = gradient_as_loss(made, self.towards_teacher(made, source, text, draw))
            loss = section.dmd_weight * dmd + loss
            metrics["dmd_loss"] = dmd
        metrics["loss"] = loss
        norm = update(self.generator, loss)
        if norm is not None:
            self.average.update()
            metrics["grad_norm"] = norm
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def towards_teacher(self, made: Tensor, source: Tensor, text: Tensor, draw: Draw) -> Tensor:
        """The DMD gradient in what the generator made, of its shape."""
        timestep = self.draw_timestep(made, draw)
        noisy = self.schedule.add_noise(made, draw.normal_like(made), timestep)
        fake = self.clean(self.critic.module, noisy, source, timestep, text)
        real = guided(
            self.clean(self.real, noisy, source, timestep, text),
            self.clean(self.real, noisy, source, timestep, torch.zeros_like(text)),
            self.section.guidance,
        )
        return dmd_gradient(made, real, fake)

    def train_critic(
        self, made: Tensor, source: Tensor, text: Tensor, draw: Draw
    ) -> dict[str, Tensor]:
        timestep = self.draw_timestep(made, draw)
        noise = draw.normal_like(made)
        noisy = self.schedule.add_noise(made, noise, timestep)
        predicted = self.critic(noisy, source, timestep, text, bidirectional(made.shape[1]))
        loss = velocity_loss(predicted, velocity(made, noise))
        norm = update(self.critic, loss)
        metrics = {"critic_loss": loss.detach()}
        return metrics if norm is None else metrics | {"critic_grad_norm": norm}

    def draw_timestep(self, made: Tensor, draw: Draw) -> Tensor:
        drawn = draw_timesteps(draw, self.schedule, made.shape[0])[:, 0]  # [B]
        return drawn.clamp(self.section.min_timestep, self.section.max_timestep)

    def clean(
        self, network: Any, noisy: Tensor, source: Tensor, timestep: Tensor, text: Tensor
    ) -> Tensor:
        """A score network's clean estimate [B, F, C, h, w]."""
        predicted = network(noisy, source, timestep, text, bidirectional(noisy.shape[1]))
        return self.schedule.to_x0(noisy, predicted, timestep)

    def judge(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        """How far the generator's own stream, all its steps, is from the truth."""
        source, target, text = (
            batch[name].to(self.setting.device) for name in ("source", "target", "text")
        )
        made = rollout(
            None,
            self.generator.module,
            self.config,
            self.stream,
            self.schedule,
            source=source,
            text=text,
            last_step=len(self.stream.timesteps) - 1,
            generator=draw.own,
            dtype=self.setting.dtype,
        )
        section = self.section
        weight = edit_weight(source, target, section.edit_weight, section.edit_full)
        return {"loss": regression_loss(made, target, weight)}

    def export(self) -> Exported:
        card = {"weights": f"average of the generator, decay {self.average.decay}"}
        weights = self.average.full_weights(keep=self.setting.rank == 0)
        return Exported(transformer=weights, card=card)


def _teacher(setting: Setting) -> Transformer:
    """The foundation model, frozen, on the worker's device: replicated, without an engine."""
    path = setting.models.get("teacher")
    if path is None:
        raise ModelError(
            "distill needs the foundation model as its teacher; give extra={'teacher': path}"
        )
    network = load_model(path, device=setting.device, dtype=setting.dtype).transformer
    if network is None:
        raise ModelError(f"the teacher {path} holds no transformer; give a foundation model")
    return network
