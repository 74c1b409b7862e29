"""What a stage is to the training loop, and what it is told about where it runs.

B batch, F latents, C channels, h x w latent size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, distributed

from modeling.diffusion.flow import GRID, FlowSchedule
from modeling.diffusion.sequence import Sequence
from modeling.diffusion.transformer import Transformer
from modeling.model_dir import Model, load_model
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.rules import CHOOSING, WATCHING
from pipelines.training.export import Exported
from pipelines.training.job import Job
from pipelines.training.run_folder import RunFolder
from pipelines.training.zero.average import Ema
from pipelines.training.zero.inside import ZeroEngine

if TYPE_CHECKING:
    from modeling.gpu.training import RolloutForward

_HELD_OUT = 20  # seed
_LONG_SECONDS = 10.0  # a part of the start that takes less is not worth telling


@dataclass(frozen=True)
class Setting:
    """One worker's place in a training job."""

    job: Job
    rank: int
    world_size: int
    device: torch.device

    @property
    def stage(self) -> str:
        return self.job.stage

    @property
    def config(self) -> PipelineConfig:
        return self.job.config

    @property
    def section(self) -> Any:
        """The stage's own configuration."""
        return getattr(self.config, self.stage)

    @property
    def seed(self) -> int:
        seed = self.section.seed
        return int(self.config.seed if seed is None else seed)

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return torch.bfloat16 if self.config.compute.precision == "bf16" else torch.float32

    @property
    def sharing(self) -> int:
        """How many workers, one after another, share every clip."""
        return self.config.compute.sharing(self.stage)

    @property
    def data_rank(self) -> int:
        """Which of the groups that take clips of their own this worker belongs to."""
        return self.rank // self.sharing

    @property
    def data_workers(self) -> int:
        return self.world_size // self.sharing

    @cached_property
    def sequence(self) -> Sequence | None:
        """Who shares this worker's clips, None for nobody; a collective when it is first asked."""
        size = self.sharing
        if size == 1:
            return None
        groups = [
            distributed.new_group(list(range(first, first + size)))
            for first in range(0, self.world_size, size)
        ]
        return Sequence(groups[self.data_rank], self.rank % size, size)

    @property
    def clip_frames(self) -> int | None:
        """How many frames of a pair's source or target the stage reads; None reads whole pairs."""
        return int(self.section.clip_frames) if self.stage == "vae" else None

    @property
    def is_sharded(self) -> bool:
        """Whether no worker holds the whole weights of a transformer."""
        return self.config.compute.zero_stage == 3 and self.stage != "vae"

    def plain(self) -> dict[str, Any]:
        """The stage's settings by name, but those that change nothing, and the workers."""
        values = {
            f"{self.stage}.{name}": list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self.section).items()
            if name not in (*WATCHING, *CHOOSING)
        }
        return values | {
            "compute.workers": self.world_size,
            "compute.sequence_parallel": self.sharing,
            "compute.zero_stage": self.config.compute.zero_stage,
            "compute.precision": self.config.compute.precision,
            "compute.offload": self.config.compute.offload,
        }

    def draw(self, step: int, micro: int) -> Draw:
        return Draw(self, step, micro)


class Draw:
    """The random numbers of one batch: they depend on seed, step, accumulation and who shares the
    clips alone, so a resumed training draws what an unbroken one would, with no random state to
    keep."""

    def __init__(self, setting: Setting, step: int, micro: int) -> None:
        self.step = step
        self.rank, self.world_size = setting.data_rank, setting.data_workers
        self.device = setting.device
        place = [setting.seed, step, micro]
        self.own = _generator(self.device, [*place, 1 + self.rank])
        self.shared = _generator(self.device, [*place, 0])  # the same on all ranks

    def normal_like(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=self.device, generator=self.own)

    def spread(self, batch: int, columns: int = 1) -> Tensor:
        """Uniform numbers [batch, columns] in [0, 1), evenly spread over the clips of all ranks.

        Each number by itself is uniform, columns are independent, and the rows of all ranks are
        1 / (batch * world_size) apart: losses of different noise levels differ by an order of
        magnitude, and spreading them halves the noise of a small batch's gradient.
        """
        offset = torch.rand(1, columns, device=self.device, generator=self.shared)
        row = torch.arange(batch, device=self.device)[:, None] + self.rank * batch
        return (offset + row / (batch * self.world_size)) % 1.0

    def keep(self, batch: int, dropout: float) -> Tensor:
        """[batch, 1, 1, 1, 1]: 0 with probability `dropout`, else 1."""
        drawn = torch.rand(batch, 1, 1, 1, 1, device=self.device, generator=self.own)
        return (drawn >= dropout).float()


class FixedDraw(Draw):
    """The same random numbers for held-out clip `place` of `clips` in every training; noise levels
    are spread over the clips."""

    def __init__(self, setting: Setting, place: int, clips: int) -> None:
        self.step, self.rank, self.world_size = 0, place, clips
        self.device = setting.device
        self.own = _generator(self.device, [_HELD_OUT, 1 + place])
        self.shared = _generator(self.device, [_HELD_OUT, 0])


def draw_timesteps(draw: Draw, schedule: FlowSchedule, batch: int, columns: int = 1) -> Tensor:
    """Grid entries of `schedule`, [batch, columns], uniform over the grid's places."""
    places = (draw.spread(batch, columns) * GRID).long().clamp_max(GRID - 1)
    return schedule.timesteps[places]


class Stage(Protocol):
    """A stage's networks, engines and losses. The loop does everything else."""

    engines: dict[str, ZeroEngine]  # every network that is trained; a checkpoint holds them all
    learning_rates: dict[str, float]  # peak of each engine
    ema: Ema | None

    def step(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        """Forward, backward and `engines.update` on one batch; scalars to log, still on the device.

        Every rank must run equally many forwards of every network.
        """

    def judge(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        """Losses of the network as it is on one held-out clip, `JUDGED` in the stage's settings."""

    def flops(self, batch: dict[str, Any], step: int) -> float | None:
        """Model FLOPs of `step` on this batch, on this rank; None where nobody counts them."""

    def tokens(self, batch: dict[str, Any]) -> float:
        """Of this batch's pairs; 0 where it is pixels."""

    def export(self) -> Exported:
        """The finished model; a collective, whose weights only rank 0 needs to hold."""


def tokens_of(latents: Tensor) -> float:
    """Of clips [B, F, C, h, w], one for 2 x 2 cells."""
    clips, frames, _, height, width = latents.shape
    return clips * frames * height * width / 4


@contextmanager
def starting(setting: Setting, part: str) -> Iterator[None]:
    """Tell whoever watches how long a part of the start took, if it took long: with networks of
    14 B parameters there are minutes until the first step."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    if took > _LONG_SECONDS and setting.rank == 0:
        RunFolder(setting.job.folder).say(f"start: {part} took {took:.0f} s")


def load_start(setting: Setting) -> Model:
    """The model that the stage starts from, in float32 on the worker's device; where weights are
    sharded the transformer stays in the host's memory, in its file's precision, which workers of a
    machine share."""
    if not setting.is_sharded:
        return load_model(setting.job.start, device=setting.device, dtype=torch.float32)
    model = load_model(setting.job.start)
    if model.vae is not None:
        model.vae.to(device=setting.device, dtype=torch.float32)
    return model


def prepare_network(network: Transformer, setting: Setting) -> None:
    """Make a transformer ready for training, or for scoring: who shares its tokens, what it
    recomputes, and on a GPU the fused blocks, which compute the same function."""
    compute, sequence = setting.config.compute, setting.sequence
    if sequence is not None:
        sequence.heads_of(network.config)  # UserError where they cannot be shared out
    network.sequence = sequence
    network.gradient_checkpointing = compute.activation_checkpointing
    network.recompute_attention = compute.recompute_attention
    network.keep_products = getattr(setting.section, "keep_products", 0)
    if setting.device.type == "cuda":
        from modeling.gpu.training import fuse_blocks  # Triton exists only where there is a GPU

        fuse_blocks(network)


def fast_rollouts(network: Transformer, setting: Setting) -> RolloutForward | None:
    """What runs rollouts of `network`, whose weights are whole, without gradient, as streams run;
    None where that is not at hand: on a CPU, in float32, and where the attention that it takes is
    not among those that give the same bits in every run."""
    compute = setting.config.compute
    whole = not setting.is_sharded or getattr(setting.section, "rollout_copy", False)
    if not (setting.device.type == "cuda" and whole):
        return None
    if setting.dtype != torch.bfloat16 or compute.deterministic:
        return None
    from modeling.gpu.training import RolloutForward  # Triton exists only where there is a GPU

    return RolloutForward(network)


def _generator(device: torch.device, words: list[int]) -> torch.Generator:
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)
