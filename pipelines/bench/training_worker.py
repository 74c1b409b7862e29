"""One process of a training benchmark: the product's own training loop, without Ray around it.

Ray starts processes and keeps checkpoints; what happens in a step is the same here.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from infra.runtime.environment import environment
from pipelines.bench.drawn import draw_dataset, draw_model
from pipelines.bench.machine import hardware, yardstick
from pipelines.config.load import from_plain
from pipelines.config.pipeline import PipelineConfig
from pipelines.training.job import Job
from pipelines.training.loop import Training
from pipelines.training.methods.base import Setting
from pipelines.training.run_folder import RunFolder
from pipelines.training.saver import Write
from pipelines.training.watch.speed import GIB

TIMEOUT = timedelta(minutes=5)  # of a collective; a process that died is noticed sooner
SAMPLES = 8  # at least so many are drawn, or two batches for each worker
# Steps that are not counted: the first compiles kernels and makes the optimizer's state, the second
# is the first to lay out memory beside that.
WARM_UP = 2


@dataclass(frozen=True)
class TrainCase:
    """One row of the benchmark."""

    stage: str
    workers: int
    zero: int

    @property
    def name(self) -> str:
        return f"{self.stage}, {self.workers} workers, ZeRO-{self.zero}"


def work(rank: int, job: dict[str, Any]) -> None:
    """Run `job["cases"]`, all of one number of workers, one after the other.

    Rank 0 writes `machine.json` and a line of results for each case that is done; whoever runs out
    of memory writes one that says so and raises, which ends the group.
    """
    workers, folder = job["cases"][0]["workers"], Path(job["folder"])
    cuda: bool = job["cuda"]
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    config = from_plain(job["config"])
    with environment({"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(workers)}):
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"file://{folder}/meeting-{job['group']}",
            rank=rank,
            world_size=workers,
            timeout=TIMEOUT,
            device_id=device if cuda else None,
        )
        try:
            if rank == 0:
                _prepare(folder, config, device)
            distributed.barrier()
            for number, case in enumerate(job["cases"]):
                place = folder / f"case-{job['group']}-{number}"
                try:
                    result = _run(TrainCase(**case), config, place, folder, rank, device)
                except torch.OutOfMemoryError:
                    _tell(job, case | {"out_of_memory": True})
                    raise
                if rank == 0:
                    _tell(job, case | {"out_of_memory": False} | result)
        finally:
            distributed.destroy_process_group()


def _tell(job: dict[str, Any], result: dict[str, Any]) -> None:
    with Path(job["folder"], f"results-{job['group']}.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def _prepare(folder: Path, config: PipelineConfig, device: torch.device) -> None:
    """Whatever all cases share, unless an earlier group of processes has left it."""
    if (folder / "machine.json").exists():
        return
    model = config.model.resolve()
    draw_model(folder / "model", model, device)
    batch = max(getattr(config, stage).batch_size for stage in ("foundation", "causal", "distill"))
    most = torch.cuda.device_count() if device.type == "cuda" else distributed.get_world_size()
    draw_dataset(folder / "encoded", model, config.data.frames, max(SAMPLES, 2 * most * batch))
    machine = {"hardware": hardware(device), "yardstick": yardstick(device)}
    (folder / "machine.json").write_text(json.dumps(machine))


def _run(
    case: TrainCase,
    config: PipelineConfig,
    place: Path,
    shared: Path,
    rank: int,
    device: torch.device,
) -> dict[str, Any]:
    """The case's figures, complete on rank 0."""
    run_folder = RunFolder(place)
    if rank == 0:
        run_folder.open()
    distributed.barrier()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    job = Job(
        stage=case.stage,
        config=replace(config, compute=replace(config.compute, zero_stage=case.zero)),
        start=shared / "model",
        dataset=str(shared / "encoded"),
        output=place / "model",
        folder=place,
        models={"teacher": shared / "model"},
    )
    training = Training(Setting(job, rank, case.workers, device), run_folder)
    started = time.monotonic() - began
    training.train(_keep_nothing)
    allocated = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    for engine in training.stage.engines.values():
        engine.destroy()  # or its hooks keep it alive
    del training
    _let_go(device)
    reports = run_folder.reports(0)[0] if rank == 0 else []
    return {
        "start_s": started,
        "allocated_gib": allocated,
        "steps": [report.metrics for report in reports[WARM_UP:]],
    }


def _keep_nothing(write: Write, step: int) -> None:
    raise AssertionError(f"a benchmark saved its state at step {step}")


def _let_go(device: torch.device) -> None:
    """Give the memory of one case's engines back, which hang in reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
