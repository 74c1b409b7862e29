"""Causal: the same editor chunk by chunk, taught with true history (teacher forcing).

The clip is stacked twice on the frame axis: a clean half, which is what a stream's cache holds
after its refresh (timestep 0, source channels beside it as there), and a noisy half whose chunks
see themselves and, of the clean chunks before them, what the stream's window would show at the
positions that it has there (`history="full"`: all of them, as published). Each chunk draws its own
noise level; only the noisy half is judged. The published code has this layout in its model but
trains on noisy history.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeling.config import StreamConfig
from modeling.diffusion.attention import Spans, teacher_forcing
from pipelines.config.stages import CausalStage
from pipelines.training.methods.base import Draw, draw_timesteps
from pipelines.training.methods.foundation import FoundationTraining


def visibility(section: CausalStage, stream: StreamConfig, frames: int) -> Spans:
    """What the transformer sees in training on clips of so many latents."""
    if section.history == "full":
        return teacher_forcing(frames, stream.chunk_latents)
    return teacher_forcing(
        frames,
        stream.chunk_latents,
        window=stream.window_latents,
        sinks=stream.sink_latents,
        window_positions=stream.window_positions,
    )


class CausalTraining(FoundationTraining):
    """See `base.Stage`."""

    def loss(
        self, network: Any, source: Tensor, target: Tensor, text: Tensor, draw: Draw
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clips, frames = source.shape[:2]
        chunk = self.stream.chunk_latents
        timestep = draw_timesteps(draw, self.schedule, clips, frames // chunk)
        timestep = timestep.repeat_interleave(chunk, dim=1)  # [B, F]
        noise = draw.normal_like(target)
        noisy = self.schedule.add_noise(target, noise, timestep)
        predicted = network(
            torch.cat([target, noisy], dim=1),
            torch.cat([source, source], dim=1),
            torch.cat([torch.zeros_like(timestep), timestep], dim=1),
            text,
            self.visibility(frames),
        )
        return self.compare(predicted[:, frames:], source, target, noise, timestep)

    def visibility(self, frames: int) -> Spans:
        return visibility(self.section, self.stream, frames)
