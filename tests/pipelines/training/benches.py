"""One stage's training in the test's own process, with plain PyTorch in DeepSpeed's place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.sample import EncodedPair
from data.shards import write_dataset
from pipelines.config.pipeline import PipelineConfig
from pipelines.training.export import Exported
from pipelines.training.job import Job
from pipelines.training.loop import Training
from pipelines.training.methods.base import Draw, Setting, tokens_of
from pipelines.training.run_folder import RunFolder, TrainingReport
from pipelines.training.saver import Write
from tests.pipelines.training.plain import PlainEngine

STAGES = ("vae", "foundation", "causal", "distill")
PAIRS = 6
TIMES = (
    *("seconds_per_step", "data_seconds_per_step", "save_seconds_per_step"),
    *("tflops", "tokens_per_second"),
)


def encoded_pair(seed: int) -> EncodedPair:
    rng = np.random.default_rng(seed)
    clip = (6, 16, 4, 6)
    return EncodedPair(
        source=rng.standard_normal(clip, np.float32),
        target=rng.standard_normal(clip, np.float32),
        text=rng.standard_normal((24, 64), np.float32),
        instruction=str(seed),
        fps=16.0,
        video_shape=(21, 32, 48),
    )


def write(uri: Path, first: int = 0) -> str:
    samples = [partial(encoded_pair, seed) for seed in range(first, first + PAIRS)]
    write_dataset(str(uri), samples, made_by={}, samples_per_shard=2)
    return str(uri)


@dataclass
class Bench:
    """One stage's training in a folder of its own."""

    stage: str
    dataset: str
    start: Path
    folder: Path
    config: PipelineConfig = field(default_factory=PipelineConfig)
    saved: list[tuple[int, Path]] = field(default_factory=list)  # (steps done, copy)
    heldout: str | None = None

    def set(self, **section: Any) -> Bench:
        for name, value in section.items():
            assert hasattr(getattr(self.config, self.stage), name), name
            setattr(getattr(self.config, self.stage), name, value)
        return self

    def job(self) -> Job:
        return Job(
            stage=self.stage,
            config=self.config,
            start=self.start,
            dataset=self.dataset,
            output=self.folder / "model",
            folder=self.folder,
            models={"teacher": self.start},
            heldout=self.heldout,
            card={"stage": self.stage},
        )

    def setting(self, rank: int = 0, world_size: int = 1) -> Setting:
        self.folder.mkdir(parents=True, exist_ok=True)  # a start that takes long is told there
        return Setting(self.job(), rank, world_size, torch.device("cpu"))

    def training(self, saved: Path | None = None, rank: int = 0, world_size: int = 1) -> Training:
        folder = RunFolder(self.folder)
        folder.open()
        if saved is not None:
            shutil.copytree(saved, self.folder / "checkpoint_000000")
        return Training(self.setting(rank, world_size), folder)

    def run(self, saved: Path | None = None) -> dict[str, Any]:
        return self.training(saved).run(self.keep)

    def keep(self, write: Write, step: int) -> None:
        self.saved.append((step, self.folder / f"saved-{step}"))
        write(self.folder / f"saved-{step}")

    @property
    def reports(self) -> list[TrainingReport]:
        return RunFolder(self.folder).reports(0)[0]

    @property
    def said(self) -> list[str]:
        return RunFolder(self.folder).said(0)[0]


@dataclass
class Scripted:
    """A stage that gives back what `script(step, micro)` says, and notes what it is asked."""

    script: Callable[[int, int], dict[str, float]]
    exported: Exported = field(default_factory=Exported)
    asked: list[tuple[int, int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)
    ema: None = None

    def build(self, setting: Setting, model: Any) -> Scripted:
        self.setting, section = setting, setting.section
        self.engines = {
            name: PlainEngine(nn.Linear(1, 1), setting.config.compute, section, 9.0)
            for name in ("one", "two")
        }
        self.learning_rates = {"one": section.learning_rate, "two": 3 * section.learning_rate}
        return self

    def step(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        number = torch.rand(1, generator=draw.own).item()
        drawn = [
            torch.rand(1, generator=self.setting.draw(draw.step, micro).own).item()
            for micro in range(self.setting.section.grad_accumulation)
        ]
        micro = drawn.index(number)
        self.asked.append((draw.step, micro))
        self.keys += batch["key"]
        one, two = (e.optimizer.param_groups[0]["lr"] for e in self.engines.values())
        self.rates.append((one, two))
        return {k: torch.tensor(v) for k, v in self.script(draw.step, micro).items()}

    def flops(self, batch: dict[str, Any], step: int) -> float:
        return 1e12 * (step + 1)

    def tokens(self, batch: dict[str, Any]) -> float:
        return tokens_of(batch["source"]) if "source" in batch else 0.0

    def export(self) -> Exported:
        return self.exported
