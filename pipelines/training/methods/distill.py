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

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modeling.config import ModelConfig, StreamConfig, TransformerConfig
from modeling.diffusion.attention import bidirectional
from modeling.diffusion.flops import FORWARD_AND_BACKWARD, forward_flops
from modeling.diffusion.flow import FlowSchedule, velocity
from modeling.diffusion.transformer import Transformer
from modeling.losses.dmd import dmd_gradient, gradient_as_loss, guided
from modeling.losses.velocity import edit_weight, regression_loss, velocity_loss
from modeling.model_dir import Model, ModelError, load_model
from pipelines.config.stages import DistillStage
from pipelines.training.export import Exported
from pipelines.training.methods.base import (
    Draw,
    Setting,
    draw_timesteps,
    fast_rollouts,
    prepare_network,
    starting,
    tokens_of,
)
from pipelines.training.methods.rollout import exit_step, rollout, rollout_flops
from pipelines.training.zero.average import Ema
from pipelines.training.zero.engines import deepspeed_config, gather_by_block, make_engine, update
from pipelines.training.zero.inside import copy_weights, shard_frozen

SCORES = 3  # forwards that a generator update is judged by: fake, real with and without text


def _learns(section: DistillStage, step: int) -> bool:
    return section.dmd_weight <= 0 or step % section.generator_every == 0


def step_flops(
    section: DistillStage,
    student: TransformerConfig,
    score: TransformerConfig,
    stream: StreamConfig,
    clip: Sequence[int],
    step: int,
    last_step: int,
) -> float:
    """Of `step` on clips [B, F, C, h, w]: rollout up to denoising step `last_step`, teacher and
    critic, both of size `score`."""
    clips, frames, _, height, width = clip
    count = partial(forward_flops, student, height=height, width=width)
    seen = min(frames, (section.scored_chunks or frames) * stream.chunk_latents)
    whole = forward_flops(score, frames=seen, pairs=seen**2, height=height, width=width)
    steps = [rollout_flops(count, frames, stream, place) for place in range(last_step + 1)]
    total = sum(map(sum, steps)) + sum(rollout_flops(count, frames, stream, None)[:-1])
    learns = _learns(section, step)
    if learns:
        learning = section.gradient_chunks or section.scored_chunks or frames
        total += (FORWARD_AND_BACKWARD - 1) * sum(steps[-1][-learning:])
    if section.dmd_weight > 0:
        total += (FORWARD_AND_BACKWARD + (SCORES if learns else 0)) * whole  # the critic's first
    return clips * total


class DistillTraining:
    """See `base.Stage`."""

    def __init__(self, setting: Setting, model: Model) -> None:
        assert model.transformer is not None
        section, compute = setting.section, setting.config.compute
        self.setting, self.section = setting, section
        self.config, self.stream = model.config.transformer, model.config.stream
        if not section.mask_cache:
            self.stream = replace(self.stream, mask_cache=None)
        self.schedule = FlowSchedule(self.stream.shift, setting.device)
        prepare_network(model.transformer, setting)
        self.copies = compute.zero_stage == 3 and section.rollout_copy
        if section.batch_size == 1:  # clips learn one by one, each through every block once
            gather_by_block(model.transformer, compute)
        elif compute.zero_stage == 3:
            # A recomputed block gathers its layers' weights anew, which PyTorch's bookkeeping of
            # what was kept does not bear.
            model.transformer.recompute_attention = True
        with starting(setting, "the generator"):
            self.generator = make_engine(model.transformer, compute, section, section.learning_rate)
        self.engines = {"generator": self.generator}
        self.learning_rates = {"generator": section.learning_rate}
        self.matches = section.dmd_weight > 0
        if self.matches:
            (real, self.scores), (critic, _) = (_teacher(setting, model.config) for _ in range(2))
            for network in (real, critic):
                prepare_network(network, setting)
            self.real: Any = real
            with starting(setting, "the teacher"):
                if setting.is_sharded:
                    self.real = shard_frozen(real, deepspeed_config(compute, section))
            gather_by_block(critic, compute)
            with starting(setting, "the critic"):
                self.critic = make_engine(critic, compute, section, section.critic_learning_rate)
            self.engines["critic"] = self.critic
            self.learning_rates["critic"] = section.critic_learning_rate
        self.passed: Any = self.generator.module  # the generator, for forwards without gradient
        if self.copies:
            self.passed = _empty_copy(setting, model)
            prepare_network(self.passed, setting)
        self.stale = True  # the weights that rollouts run on are not the generator's
        self.forwards = fast_rollouts(self.passed, setting)
        with starting(setting, "the average"):
            self.average = Ema(self.generator, section.ema_decay)
        self.ema: Ema | None = self.average

    def step(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        device = self.setting.device
        source, target = batch["source"].to(device), batch["target"].to(device)  # [B, F, C, h, w]
        text = batch["text"].to(device)  # [B, L, D]
        metrics: dict[str, Tensor] = {}
        learns = self.learns(draw.step)
        truth = target if self.section.history == "truth" else None
        made = self.edit(source, text, draw, learns, truth=truth)
        made, source, target = (self.scored(clip) for clip in (made, source, target))
        if learns:
            metrics |= self.train_generator(made, source, target, text, draw)
        if self.matches:
            metrics |= self.train_critic(made.detach(), source, text, draw)
        return metrics

    def renew(self) -> None:
        """Let rollouts run on the generator's weights as they are now; a collective."""
        if not self.stale:
            return
        if self.copies:
            copy_weights(self.generator, self.passed)
        if self.forwards is not None:
            self.forwards.renew()
        self.stale = False

    def learns(self, step: int) -> bool:
        """Whether the generator is updated in this step, and not the critic alone."""
        return _learns(self.section, step)

    def last_step(self, step: int) -> int:
        return exit_step(self.setting.seed, step, len(self.stream.timesteps))

    def scored(self, clip: Tensor) -> Tensor:
        """The end of [B, F, ...] that truth, teacher and critic look at."""
        chunks = self.section.scored_chunks
        return clip if chunks is None else clip[:, -chunks * self.stream.chunk_latents :]

    def edit(
        self,
        source: Tensor,
        text: Tensor,
        draw: Draw,
        learns: bool,
        last_step: int | None = None,
        truth: Tensor | None = None,
    ) -> Tensor:
        """The generator's clip [B, F, C, h, w], with gradient if it `learns`; `last_step` None is
        the one drawn for this step. Its history is `truth`, if there is one."""
        self.renew()
        return rollout(
            self.generator if learns else None,
            self.passed,
            self.config,
            self.stream,
            self.schedule,
            source=source,
            text=text,
            last_step=self.last_step(draw.step) if last_step is None else last_step,
            generator=draw.own,
            gradient_chunks=self.section.gradient_chunks or self.section.scored_chunks,
            sequence=self.setting.sequence,
            dtype=self.setting.dtype,
            forwards=self.forwards,
            truth=truth,
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
            self.stale = True
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
        made = self.edit(source, text, draw, False, len(self.stream.timesteps) - 1)
        section = self.section
        weight = edit_weight(source, target, section.edit_weight, section.edit_full)
        return {"loss": regression_loss(made, target, weight)}

    def flops(self, batch: dict[str, Any], step: int) -> float:
        score = self.scores if self.matches else self.config
        clip = batch["source"].shape
        place = (step, self.last_step(step))
        return step_flops(self.section, self.config, score, self.stream, clip, *place)

    def tokens(self, batch: dict[str, Any]) -> float:
        return tokens_of(batch["source"])

    def export(self) -> Exported:
        card = {"weights": f"average of the generator, decay {self.average.decay}"}
        weights = self.average.full_weights(keep=self.setting.rank == 0)
        return Exported(transformer=weights, card=card)


def _empty_copy(setting: Setting, model: Model) -> Transformer:
    """A network of the generator's shape, in the precision that it computes in."""
    with torch.device(setting.device):
        network = Transformer(model.config.transformer)
    return network.to(setting.dtype).eval().requires_grad_(False)


def _teacher(setting: Setting, student: ModelConfig) -> tuple[Transformer, TransformerConfig]:
    """The foundation model, or whoever else is named, frozen, and its sizes: on the worker's
    device, or in the host's memory where weights are sharded from there."""
    path = setting.job.models.get("teacher")
    if path is None:
        raise ModelError(
            "distill needs the foundation model as its teacher; give models={'teacher': path}"
        )
    device = "cpu" if setting.is_sharded else setting.device
    model = load_model(path, device=device, dtype=setting.dtype)
    network, sizes = model.transformer, model.config.transformer
    if network is None:
        raise ModelError(f"the teacher {path} holds no transformer; give a foundation model")
    for name in ("latent_channels", "source_channels", "text_dim"):
        theirs, ours = getattr(sizes, name), getattr(student.transformer, name)
        if theirs != ours:
            raise ModelError(
                f"the teacher {path} has {name} {theirs}, its student {ours}; give a teacher of "
                "the same latents and text"
            )
    for name in ("kind", "mean", "std"):
        theirs, ours = getattr(model.config.vae, name), getattr(student.vae, name)
        if theirs != ours:
            raise ModelError(
                f"the teacher {path} was trained on the latents of another VAE (its vae.{name} is "
                f"{theirs}, its student's {ours}) and would judge what it does not know; give a "
                "teacher that was trained with the student's VAE"
            )
    return network, sizes
