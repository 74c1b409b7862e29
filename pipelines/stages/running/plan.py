"""`liveedit train --plan`: which stages would run, and why, without running any.

The pipeline's own code is walked with a runner that does no work. What a stage would make anew has
no fingerprint yet, so that all that learns from it is seen to run as well. Nothing is written and
nobody is asked, the registry neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import TRAINED_STAGES, ComputeConfig
from pipelines.stages.running import expect
from pipelines.stages.running.choice import Choice
from pipelines.stages.running.gate import missed
from pipelines.stages.running.progress import StageView
from pipelines.stages.running.runner import Enough, StageRunner, StageWork
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import StageRecord
from pipelines.training.run_folder import RunFolder
from pipelines.training.watch.speed import PEAK_TFLOPS, peak_of

LAST = "register"  # what a pipeline does after it needs the registry


@dataclass(frozen=True)
class Planned:
    """A stage's line of the plan."""

    stage: str
    does: str  # runs, goes on, finished or passed over
    why: str = ""
    workers: int | None = None
    batch: int | None = None  # clips a step, all workers together
    seconds: float | None = None
    counted: bool = False  # those by arithmetic, since the stage never ran here
    states: expect.States | None = None  # of a worker
    activations_gib: float | None = None  # the same, beside them
    trained: int | None = None  # parameters of the stage's own network

    @property
    def runs(self) -> bool:
        return self.does not in ("finished", "passed over")


class Planner(StageRunner):
    """Takes a runner's place; `lines` are what it was asked, in order."""

    def __init__(
        self,
        config: PipelineConfig,
        output: Path,
        parent: Run,
        view: StageView,
        choice: Choice,
        card: str | None = None,
    ) -> None:
        """`card` is the name of what the workers compute on, if it is known."""
        super().__init__(output, parent, view, choice)
        self.config, self.output, self.card = config, output, card
        self.lines: list[Planned] = []

    def pass_over(self, stage: str, why: str) -> None:
        self.lines.append(Planned(stage, "passed over", why))
        if self.choice.is_last(stage):
            raise Enough

    def _reuse(self, record: StageRecord) -> None:
        self.lines.append(Planned(record.stage, "finished"))
        if record.stage == LAST:
            raise Enough

    def _work(
        self,
        stage: str,
        version: int,
        inputs: Mapping[str, Any],
        output: str | Path,
        work: StageWork,
        same: str | None,
        why: str,
    ) -> StageRecord:
        before = self.records.read(stage)
        line = (
            self._trained(stage, same, why, before)
            if stage in TRAINED_STAGES
            else Planned(stage, "runs", why, seconds=_seconds(before, inputs))
        )
        self.lines.append(line)
        if stage == LAST:
            raise Enough
        nowhere = str(self.output / ".planned" / stage)  # never made
        return StageRecord(stage, "", None, nowhere, "", before.metrics if before else {})

    def _check_gate(self, record: StageRecord, gate: Mapping[str, float]) -> None:
        if record.fingerprint is not None and (
            reasons := missed(record.stage, record.metrics, gate)
        ):
            self.lines[-1] = Planned(record.stage, "finished", f"missed: {'; '.join(reasons)}")
            raise Enough

    def _trained(
        self, stage: str, same: str | None, why: str, before: StageRecord | None
    ) -> Planned:
        section, compute = getattr(self.config, stage), self.config.compute
        folder = RunFolder(self.output / "checkpoints" / f"{stage}-{str(same)[:12]}")
        done = folder.saved_step()
        workers = expect.workers_of(compute)
        plain = vars(section)
        old = before.inputs.get("config", {}) if before else {}
        left = expect.clips_trained(plain, section.steps - done)
        measured = expect.seconds_from(before, left, expect.clips_trained(old))
        counted = expect.counted_seconds(stage, self.config, section.steps - done, self.card)
        model = self.config.model.resolve()
        return Planned(
            stage,
            f"goes on at {done}" if done else "runs",
            why,
            workers,
            workers
            and workers // compute.sharing(stage) * section.batch_size * section.grad_accumulation,
            counted if measured is None else measured,
            measured is None,
            expect.states_gib(stage, section, model, compute, workers) if workers else None,
            expect.activations_gib(stage, self.config),
            expect.parameters(stage, section, model)[1],
        )


def table(lines: list[Planned]) -> Table:
    """For a terminal; a figure that nobody knows is left out."""
    why = Column("why", overflow="fold")
    heads = ("stage", "does", why, "workers", "batch", "time", "trains", "GiB a worker")
    shown = Table(*heads, box=None, pad_edge=False)
    for line in lines:
        shown.add_row(
            line.stage,
            line.does,
            line.why,
            str(line.workers or ""),
            str(line.batch or ""),
            "" if line.seconds is None else "~" * line.counted + duration(line.seconds),
            "" if line.trained is None else million(line.trained),
            memory(line),
        )
    return shown


def memory(line: Planned) -> str:
    """GiB of a worker: states, activations, and what the host keeps of the states."""
    if line.states is None:
        return ""
    told = f"{line.states.device:.3g}"
    told += "" if line.activations_gib is None else f" + {line.activations_gib:.3g}"
    return told + (f"; host {line.states.host:.3g}" if line.states.host else "")


def known_card(card: str | None) -> str | None:
    """`card`, or what this machine has. Raises ConfigError for one whose peak is not known."""
    if card is None:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if peak_of(card) is None:
        raise ConfigError(f"--card {card}: the peaks known are of {', '.join(PEAK_TFLOPS)}")
    return card


def legend(lines: list[Planned], card: str | None, compute: ComputeConfig) -> list[str]:
    """What must be known to read the figures."""
    said = []
    if any(line.states for line in lines):
        said.append("GiB a worker: weights, gradients, optimizer, averages + activations, buffers")
    if any(line.counted and line.seconds is not None for line in lines):
        share, peak = expect.mfu(compute), peak_of(str(card))
        said.append(
            f"~ is counted: the steps' model FLOPs at {share:.0%} of {card}'s {peak:g} TFLOP/s"
        )
    elif any(line.counted and line.workers for line in lines):
        said.append("say --card H100, or another, for the time of stages that never ran here")
    return said


def million(parameters: int) -> str:
    return f"{parameters / 1e6:.3g} M" if parameters < 1e9 else f"{parameters / 1e9:.3g} B"


def duration(seconds: float) -> str:
    """Two figures are enough of what is a guess."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{hours} h" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _seconds(before: StageRecord | None, inputs: Mapping[str, Any]) -> float | None:
    """Of a stage that trains nothing: as long as before, or by its number of pairs."""
    old, now = before.inputs.get("pairs") if before else None, inputs.get("pairs")
    counted = isinstance(old, int) and isinstance(now, int)
    return expect.seconds_from(before, *((now, old) if counted else (1, 1)))
