"""Plain PyTorch in DeepSpeed's and the transformer's place, so that a stage's losses can be worked
out by hand and a whole training takes milliseconds in the test's own process.

B batch, F latents, C channels, h x w latent size, L text tokens, D text size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modeling.config import ModelConfig
from modeling.model_dir import Model
from modeling.presets import PRESETS
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig, TrainedStage
from pipelines.training.job import Job
from pipelines.training.methods import distill, foundation, vae
from pipelines.training.methods.base import Setting

CLIPS, FRAMES, CHUNK, CHANNELS, HEIGHT, WIDTH = 4, 6, 3, 16, 4, 6
CONFIG: ModelConfig = replace(
    PRESETS["demo"],
    stream=replace(
        PRESETS["demo"].stream, height=32, width=48, chunk_latents=CHUNK, mask_cache=None
    ),
)


class Call(NamedTuple):
    """What a network was asked, and whether with gradient."""

    noisy: Tensor
    source: Tensor
    timestep: Tensor
    text: Tensor
    visible: Any
    grad: bool


class PlainNetwork(nn.Module):
    """Answers with a sum of what it is given, each times a factor of its own; notes every call."""

    def __init__(
        self, noisy: float = 0.0, source: float = 0.0, text: float = 0.0, time: float = 0.0
    ) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([noisy, source, text, time]))
        self.gradient_checkpointing = False
        self.calls: list[Call] = []

    def forward(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: Tensor, visible: Any
    ) -> Tensor:
        self.calls.append(
            Call(noisy.detach(), source, timestep, text, visible, torch.is_grad_enabled())
        )
        return self.answer(noisy, source, timestep, text)

    def answer(self, noisy: Tensor, source: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        a, b, c, d = self.factors
        said = text.mean(dim=(1, 2))
        return a * noisy + b * source + c * over(said, noisy) + d * over(timestep / 1000, noisy)


def over(value: Tensor, latents: Tensor) -> Tensor:
    """[B] or [B, F] beside latents [B, F, C, h, w]."""
    return value.reshape(*value.shape, *(1,) * (latents.dim() - value.dim()))


class PlainEngine:
    """What the project asks of a DeepSpeed engine, for one process."""

    def __init__(
        self,
        network: nn.Module,
        compute: ComputeConfig,
        stage: TrainedStage,
        rate: float,
        whole: bool = True,
    ) -> None:
        self.whole = whole
        if whole:
            network.requires_grad_(True)
        self.module, self.stage, self.rate = network, stage, rate
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=stage.betas)
        self.rates: list[float] = []  # of every step that was taken
        self.losses: list[float] = []
        self.forwards = 0  # a network that steps must be called through its engine
        self.micro = 0
        self._config = SimpleNamespace(load_universal_checkpoint=None)
        self.checkpoint_engine = SimpleNamespace(save=torch.save)
        self.norm: Tensor | None = None

    def __call__(self, *args: Any) -> Any:
        self.forwards += 1
        return self.module(*args)

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro + 1) % self.stage.grad_accumulation == 0

    def backward(self, loss: Tensor) -> None:
        self.losses.append(loss.item())
        (loss / self.stage.grad_accumulation).backward()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.stage.grad_clip)
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.micro += 1

    def get_global_grad_norm(self) -> Tensor | None:
        return self.norm

    def zero_optimization(self) -> bool:
        return False

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        place = Path(folder) / tag
        place.mkdir(parents=True)
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.checkpoint_engine.save(state, str(place / "engine.pt"))

    def load_checkpoint(self, folder: str, tag: str) -> None:
        state = torch.load(Path(folder) / tag / "engine.pt", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


def use_plain_engines(monkeypatch: Any) -> None:
    """Every stage trains with `PlainEngine` from now on."""
    for module in (foundation, distill, vae):
        monkeypatch.setattr(module, "make_engine", PlainEngine)


def model(network: PlainNetwork) -> Model:
    return Model(CONFIG, network, None, {}, None)  # type: ignore[arg-type]


def setting(stage: str, rank: int = 0, world_size: int = 1, **section: Any) -> Setting:
    """One worker's place in `stage`, whose section has the values given."""
    config = PipelineConfig()
    for name, value in section.items():
        assert hasattr(getattr(config, stage), name), name
        setattr(getattr(config, stage), name, value)
    here = Path("nowhere")
    models = {"teacher": here}
    job = Job(stage, config, here, "", here, here, models)
    return Setting(job, rank, world_size, torch.device("cpu"))


def batch(seed: int = 0, clips: int = CLIPS, frames: int = FRAMES) -> dict[str, Any]:
    """Source, target and text that have nothing in common; some cells are changed by little."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = (clips, frames, CHANNELS, HEIGHT, WIDTH)
    source = torch.randn(shape, generator=generator)
    target = torch.randn(shape, generator=generator)
    target[..., 0] = source[..., 0] + 0.5  # a change of mean square 0.25
    target[..., 1] = source[..., 1]
    text = torch.rand(clips, 5, 8, generator=generator) + torch.arange(clips)[:, None, None]
    return {"source": source, "target": target, "text": text}
