"""Foundation: the bidirectional editor, trained by velocity matching on [noisy target | source].

One noise level a clip, drawn on a grid of `shift` (8 as published: half the draws have sigma over
0.9). The published weight of the loss is zero at t = 1000, the level at which every edit starts;
`weighting="uniform"` is the default because a model that is never trained there starts its edits
blind: on a toy of 256 synthetic pairs (4 layers of 96, 700 steps) the mean square error on new
pairs was 0.170 against 0.197 in one step from noise, 0.163 against 0.170 in four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from modeling.config import TransformerConfig
from modeling.diffusion.attention import Spans, bidirectional
from modeling.diffusion.flops import FORWARD_AND_BACKWARD, forward_flops
from modeling.diffusion.flow import FlowSchedule, velocity
from modeling.diffusion.lora import adapt, merged
from modeling.losses.velocity import WEIGHTINGS, edit_weight, velocity_loss
from modeling.model_dir import Model, load_model
from pipelines.training.export import Exported
from pipelines.training.methods.base import (
    Draw,
    Setting,
    draw_timesteps,
    prepare_network,
    tokens_of,
)
from pipelines.training.zero.average import Ema
from pipelines.training.zero.engines import gather_by_block, make_engine, update
from pipelines.training.zero.inside import full_weights


def step_flops(size: TransformerConfig, visible: Spans, clip: Sequence[int]) -> float:
    """Of a step, forward and backward, on clips [B, F, C, h, w] whose latents see `visible`."""
    clips, _, _, height, width = clip
    forward = forward_flops(
        size, frames=len(visible.positions), pairs=visible.pairs, height=height, width=width
    )
    return FORWARD_AND_BACKWARD * clips * forward


class FoundationTraining:
    """See `base.Stage`."""

    def __init__(self, setting: Setting, model: Model) -> None:
        assert model.transformer is not None
        section, compute = setting.section, setting.config.compute
        prepare_network(model.transformer, setting)
        gather_by_block(model.transformer, compute)
        self.rank, self.device, self.start = setting.rank, setting.device, setting.job.start
        self.section = section
        self.config, self.stream = model.config.transformer, model.config.stream
        self.schedule = FlowSchedule(section.shift, setting.device)
        if section.lora_rank:
            adapt(model.transformer, section.lora_rank, section.lora_alpha, section.lora_targets)
        whole = section.lora_rank == 0
        self.engine = make_engine(
            model.transformer, compute, section, section.learning_rate, whole=whole
        )
        self.engines = {"transformer": self.engine}
        self.ema: Ema | None = None
        self.learning_rates = {"transformer": section.learning_rate}

    def step(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        source = batch["source"].to(self.device)  # [B, F, C, h, w]
        target = batch["target"].to(self.device)
        text = batch["text"].to(self.device)  # [B, L, D]
        clips = source.shape[0]
        text = text * draw.keep(clips, self.section.text_dropout)[:, :, :, 0, 0]
        source = source * draw.keep(clips, self.section.source_dropout)
        loss, metrics = self.loss(self.engine, source, target, text, draw)
        norm = update(self.engine, loss)
        return metrics if norm is None else {**metrics, "grad_norm": norm}

    def loss(
        self, network: Any, source: Tensor, target: Tensor, text: Tensor, draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        timestep = draw_timesteps(draw, self.schedule, source.shape[0])[:, 0]  # [B]
        noise = draw.normal_like(target)
        noisy = self.schedule.add_noise(target, noise, timestep)
        visible = self.visibility(source.shape[1])
        predicted = network(noisy, source, timestep, text, visible)
        return self.compare(predicted, source, target, noise, timestep)

    def visibility(self, frames: int) -> Spans:
        """What the transformer sees in training on clips of so many latents."""
        return bidirectional(frames)

    def flops(self, batch: dict[str, Any], step: int) -> float:
        clip = batch["source"].shape
        return step_flops(self.config, self.visibility(clip[1]), clip)

    def tokens(self, batch: dict[str, Any]) -> float:
        return tokens_of(batch["source"])

    def compare(
        self, predicted: Tensor, source: Tensor, target: Tensor, noise: Tensor, timestep: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        section = self.section
        weight = edit_weight(source, target, section.edit_weight, section.edit_full)
        level = WEIGHTINGS[section.weighting](self.schedule, timestep)  # [B] or [B, F]
        weight = weight * level.reshape(*level.shape, *(1,) * (5 - level.dim()))
        loss = velocity_loss(predicted, velocity(target, noise), weight)
        return loss, {"loss": loss.detach()}

    def judge(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        source, target, text = (batch[n].to(self.device) for n in ("source", "target", "text"))
        return self.loss(self.engine.module, source, target, text, draw)[1]

    def export(self) -> Exported:
        section, keep = self.section, self.rank == 0
        weights = full_weights(self.engine, keep=keep)
        if not section.lora_rank:
            return Exported(transformer=weights)
        card = {"weights": f"merged with adapters of rank {section.lora_rank}"}
        if keep:  # with the start's own weights, which training rounds to its precision
            start = load_model(self.start).transformer
            assert start is not None
            weights = merged(start.state_dict(), weights, section.lora_alpha / section.lora_rank)
        return Exported(transformer=weights, card=card)
