"""How fast the trained stages are: seconds a step, model TFLOP/s, MFU, memory, waiting for data.

Every case (a stage on so many workers with a ZeRO stage) runs the product's own loop on drawn
weights and latents. What is done is written
down at once, so that a benchmark that is cut off still leaves figures.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product, takewhile
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from infra.runtime.errors import UserError
from pipelines.bench import SCHEMA
from pipelines.bench.check import TOLERANCE
from pipelines.bench.training_worker import WARM_UP, TrainCase, work
from pipelines.config.load import section_plain, to_plain
from pipelines.config.pipeline import PipelineConfig

STAGES = ("foundation", "causal", "distill")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TrainOptions:
    """What is asked for."""

    config: PipelineConfig
    cuda: bool
    stages: tuple[str, ...]
    workers: tuple[int, ...]  # one a GPU
    zero: tuple[int, ...]
    steps: int  # timed steps of each case

    def __post_init__(self) -> None:
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise UserError(
                f"--stages {','.join(unknown)} cannot be timed; choose of {', '.join(STAGES)}"
            )
        if self.steps < 1:
            raise UserError(f"--steps {self.steps} times nothing; take 1 or more")
        gpus = torch.cuda.device_count()
        if self.cuda and max(self.workers) > gpus:
            raise UserError(f"--gpus {max(self.workers)}, but this machine has {gpus}; take fewer")
        for workers in self.workers:
            self.config.compute.check_sharing(workers)
        for zero in self.zero:
            replace(self.config.compute, zero_stage=zero)  # ConfigError for what cannot be

    @property
    def cases(self) -> list[TrainCase]:
        """By workers, so that each number of them starts once."""
        named = product(self.workers, self.stages, self.zero)
        return [TrainCase(stage, workers, zero) for workers, stage, zero in named]

    def prepared(self) -> PipelineConfig:
        """The configuration that the workers get: every step is reported, and nothing saved."""
        changes = {
            "steps": self.steps + WARM_UP,
            "log_every": 1,
            "checkpoint_every": self.steps + WARM_UP + 1,
            "checkpoint_minutes": 0.0,
        }
        stages = {stage: replace(getattr(self.config, stage), **changes) for stage in STAGES}
        return replace(self.config, **stages)


def measure(
    options: TrainOptions,
    check: Callable[[dict[str, Any]], None] = lambda report: None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """The report after every case, as JSON values; the last is whole.

    `check` may refuse the work (a stored report was of another) before anything starts; `note`
    hears what is going on.
    """
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": _describe(options),
        "hardware": {"device": "cuda" if options.cuda else "cpu"},
        "cases": [],
    }
    check(report)
    with tempfile.TemporaryDirectory(prefix="liveedit-bench-") as scratch:
        folder = Path(scratch)
        todo = options.cases
        while todo:
            group = together(todo)
            note(f"{group[0].name}; {len(todo)} cases to do")
            for result in _run(options, group, folder):
                machine = json.loads((folder / "machine.json").read_text())
                report |= machine
                report["cases"] = [*report["cases"], summary(result)]
                report["ratios"] = ratios(report)
                todo = [case for case in todo if case.name != report["cases"][-1]["name"]]
                note(f"after {report['cases'][-1]['name']}; {len(todo)} cases to do")
                yield report


def together(cases: list[TrainCase]) -> list[TrainCase]:
    """The next cases that may share processes: of one number of workers, and ZeRO-3 is alone,
    since DeepSpeed does not give back what it held."""
    first = cases[0]
    if first.zero == 3:
        return [first]
    others = takewhile(lambda case: (case.workers, case.zero < 3) == (first.workers, True), cases)
    return list(others)


def _run(options: TrainOptions, cases: list[TrainCase], folder: Path) -> Iterator[dict[str, Any]]:
    """What processes of their own, one a worker, find out about `cases`; all of them, or up to one
    that does not fit into memory."""
    job = {
        "cases": [asdict(case) for case in cases],
        "config": to_plain(options.prepared()),
        "cuda": options.cuda,
        "folder": str(folder),
        "group": uuid4().hex,
    }
    results = folder / f"results-{job['group']}.jsonl"
    results.touch()
    context = spawn(work, args=(job,), nprocs=cases[0].workers, join=False)
    told, running = 0, True
    try:
        while running:
            try:
                running = not context.join(timeout=POLL_SECONDS)
            except ProcessRaisedException:
                if not _out_of_memory(results):
                    raise
                running = False
            lines = results.read_text().splitlines()
            for line in lines[told:]:
                yield json.loads(line)
            told = len(lines)
    finally:
        for process in context.processes:
            process.kill()


def _out_of_memory(results: Path) -> bool:
    lines = results.read_text().splitlines()
    return bool(lines) and json.loads(lines[-1])["out_of_memory"]


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """One case's row of figures from what its steps reported."""
    steps = result.pop("steps", [])
    case = TrainCase(result["stage"], result["workers"], result["zero"])
    row = {"name": case.name, **result}
    if not steps:
        return row
    seconds = [step["seconds_per_step"] for step in steps]
    flops = [step["tflops"] * step["seconds_per_step"] for step in steps]
    mfu = [step["mfu"] * step["seconds_per_step"] for step in steps if "mfu" in step]
    return row | {
        "seconds": float(np.mean(seconds)),
        "seconds_of_steps": seconds,
        "model_tflop": float(np.mean(flops)),  # a step and worker
        "tflops": sum(flops) / sum(seconds),
        "mfu": sum(mfu) / sum(seconds) if mfu else None,
        "data_wait_s": float(np.mean([step["data_seconds_per_step"] for step in steps])),
        "reserved_gib": steps[-1].get("gpu_memory_gib"),
        "loss": steps[-1]["loss"],
    }


def ratios(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Quotients inside one report that do not depend on the machine, each better when smaller.

    A step's time over the time that its model FLOPs would take as one large matrix product, and a
    case's step on more workers over that on fewer.
    """
    product_tflops = report["yardstick"]["tflops"]
    timed = [case for case in report["cases"] if "seconds" in case]
    values: dict[str, float] = {}
    for case in timed:
        values[f"{case['name']} / matrix products"] = product_tflops / case["tflops"]
        for other in timed:
            same = (other["stage"], other["zero"]) == (case["stage"], case["zero"])
            if same and other["workers"] < case["workers"]:
                values[f"{case['name']} / {other['workers']} workers"] = (
                    case["seconds"] / other["seconds"]
                )
    return {name: {"value": value, "tolerance": TOLERANCE} for name, value in values.items()}


def _describe(options: TrainOptions) -> dict[str, Any]:
    """Everything that decides the work of a step, as JSON values."""
    config = options.config
    model = config.model.resolve()
    compute = section_plain(config.compute)
    kept = (
        *("precision", "activation_checkpointing", "deterministic", "loader_workers"),
        "sequence_parallel",
    )
    return {
        "model": config.name,
        "frames": config.data.frames,
        "height": model.stream.height,
        "width": model.stream.width,
        "transformer": asdict(model.transformer),
        "compute": {name: compute[name] for name in kept},
        "batch_size": {stage: getattr(config, stage).batch_size for stage in options.stages},
        "cases": [case.name for case in options.cases],
        "steps": options.steps,
    }
