"""Kills workers of a real training at drawn steps, and compares what it makes with a training that
was left alone: the same weights, bit for bit.

Both are Ray Train jobs with checkpoints, on drawn weights and latents.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from infra.runtime.errors import UserError
from modeling.fingerprint import model_fingerprint
from modeling.model_dir import load_model
from pipelines.bench import SCHEMA
from pipelines.bench.drawn import draw_dataset, draw_model
from pipelines.bench.machine import hardware
from pipelines.config.pipeline import PipelineConfig
from pipelines.training.cluster import ray_session
from pipelines.training.job import make_job
from pipelines.training.run_folder import TrainingReport
from pipelines.training.trainer import train_stage

STEPS_A_KILL = 10
SAVE_EVERY = 3  # steps
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


@dataclass
class Kill:
    """One worker's end."""

    step: int  # steps done when it was killed
    worker: int  # which of them, in the order of their processes
    signal: str  # of SIGNALS
    at: float  # seconds after the training began
    from_step: int | None = None  # from whose checkpoint it went on; 0 is the beginning
    lost: float | None = None  # seconds until it was as far again


@dataclass
class Killer:
    """Follows a training's reports and ends a worker at each of `steps`, when they are reached, by
    one of `signals` after the other: killed, or told to end, upon which it saves first."""

    steps: list[int]
    draw: random.Random
    signals: tuple[str, ...] = ("kill",)
    kill: Callable[[int, int], None] = os.kill
    workers: Callable[[int], list[int]] = field(default=lambda pid: worker_processes(pid))
    clock: Callable[[], float] = time.monotonic
    kills: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self._dead: set[int] = set()

    def __call__(self, report: TrainingReport) -> None:
        now = self.clock() - self.began
        if report.pid in self._dead:  # written before it was killed
            return
        for kill in self.kills:
            if kill.from_step is None:
                kill.from_step = report.step - 1  # every step is reported
            if kill.lost is None and report.step >= kill.step:
                kill.lost = now - kill.at
        if self.steps and report.step >= self.steps[0]:
            self.steps = [step for step in self.steps if step > report.step]
            processes = self.workers(report.pid)
            worker = self.draw.randrange(len(processes))
            self._dead |= set(processes)  # Ray starts all of them again
            name = self.signals[len(self.kills) % len(self.signals)]
            self.kill(processes[worker], SIGNALS[name])
            self.kills.append(Kill(report.step, worker, name, now))


def worker_processes(pid: int) -> list[int]:
    """Process ids of all workers on this machine that train with the one given."""
    one = psutil.Process(pid)
    name = one.cmdline()[0].partition("::")[2].partition(".")[0]
    siblings = one.parent().children() if one.parent() else [one]
    found = []
    for sibling in siblings:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ends while it is looked at
            if name in " ".join(sibling.cmdline()):
                found.append(sibling.pid)
    return sorted(found)


def measure(
    config: PipelineConfig,
    stage: str,
    workers: int,
    kills: int,
    steps: int | None,
    seed: int,
    signals: tuple[str, ...] = ("kill",),
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report, as JSON values; `seed` draws the steps and the workers, which end by one of
    `signals` after the other."""
    if unknown := [name for name in signals if name not in SIGNALS]:
        raise UserError(f"--signals {','.join(unknown)} is unknown; use kill, term or kill,term")
    steps = steps or STEPS_A_KILL * (kills + 1)
    if not 0 < kills <= steps - 2:
        raise UserError(f"--kills {kills} do not fit into {steps} steps; give more --steps")
    draw = random.Random(seed)
    planned = sorted(draw.sample(range(2, steps), kills))
    with tempfile.TemporaryDirectory(prefix="liveedit-kills-") as scratch:
        folder = Path(scratch)
        config = _prepared(config, stage, workers, kills, steps)
        model = config.model.resolve()
        draw_model(folder / "model", model, torch.device("cpu"))
        batch = getattr(config, stage).batch_size
        samples = max(8, 2 * workers * batch)
        draw_dataset(folder / "encoded", model, config.data.frames, samples)
        with ray_session(config.compute):
            note(f"{stage}, {steps} steps without a kill")
            alone = _train(config, stage, folder, "alone", lambda report: None)
            note(f"{stage}, {steps} steps with {kills} kills")
            killer = Killer(planned, draw, signals)
            killed = _train(config, stage, folder, "killed", killer)
        different = _different(folder / "alone" / "made", folder / "killed" / "made")
    return {
        "schema": SCHEMA,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "stage": stage,
        "workers": workers,
        "steps": steps,
        "save_every": SAVE_EVERY,
        "seed": seed,
        "planned": planned,
        "kills": [asdict(kill) for kill in killer.kills],
        "seconds_alone": alone,
        "seconds_killed": killed,
        "different": different,
    }


def _prepared(
    config: PipelineConfig, stage: str, workers: int, kills: int, steps: int
) -> PipelineConfig:
    """Every step is reported, every third saved; a GPU computes the same bits each time."""
    section = replace(
        getattr(config, stage),
        steps=steps,
        log_every=1,
        checkpoint_every=SAVE_EVERY,
        validate_every=0,
        keep_best=None,
        patience=0,
    )
    compute = replace(
        config.compute, workers=workers, max_failures=kills, deterministic=True, address=None
    )
    return replace(config, compute=compute, **{stage: section})


def _train(
    config: PipelineConfig,
    stage: str,
    folder: Path,
    name: str,
    follow: Callable[[TrainingReport], None],
) -> float:
    """Seconds that it took; the model is in `folder`/`name`/made."""
    output = folder / name
    output.mkdir()
    job = make_job(
        stage,
        replace(config, output=str(output)),
        start=folder / "model",
        dataset=str(folder / "encoded"),
        output=output / "made",
        models={"teacher": folder / "model"} if stage == "distill" else {},
    )
    outcome = train_stage(job, on_progress=follow, say=lambda text: None)
    return outcome.seconds


def _different(one: Path, other: Path) -> list[str]:
    """Names of the weights that are not the same bits."""
    if model_fingerprint(one) == model_fingerprint(other):
        return []
    networks = [load_model(path).transformer for path in (one, other)]
    assert networks[0] is not None
    assert networks[1] is not None
    right = networks[1].state_dict()
    return [
        name for name, value in networks[0].state_dict().items() if not value.equal(right[name])
    ]
