"""What a worker does before its first step: its threads, and what it says of a long start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infra.runtime.environment import environment
from pipelines.training.kernels import prepare
from pipelines.training.methods import base
from pipelines.training.methods.base import Setting, starting
from pipelines.training.methods.distill import DistillTraining
from pipelines.training.run_folder import RunFolder
from tests.pipelines.training.plain import PlainNetwork, model, setting


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray leaves a worker that reserves a CPU
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("offload", "beside", "wanted"),
    [
        ("nothing", "4", 1),  # the GPU computes
        ("optimizer", "4", 6),
        ("weights", "4", 6),
        ("optimizer", None, 3),  # without Ray all of the training's workers are here
        ("optimizer", "64", 1),
    ],
)
def test_offloaded_optimizers_step_on_all_cores(
    offload: Any, beside: str | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = {0: set(range(24))}  # of this process
    monkeypatch.setattr(os, "sched_getaffinity", cores.__getitem__)
    here = replace(setting("distill", world_size=8), device=torch.device("cuda"))
    here.config.compute.deterministic = False
    here.config.compute.offload = offload
    with environment({"LOCAL_WORLD_SIZE": beside}):
        prepare(here)
    assert torch.get_num_threads() == wanted


def told(here: Setting, folder: Path) -> tuple[Setting, RunFolder]:
    opened = RunFolder(folder)
    opened.open()
    return replace(here, job=replace(here.job, folder=folder)), opened


@pytest.mark.parametrize(
    ("rank", "seconds", "wanted"),
    [(0, 63.0, ["start: the critic took 63 s"]), (1, 63.0, []), (0, 9.0, [])],
)
def test_a_long_part_of_the_start_is_told_once(
    rank: int, seconds: float, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, folder = told(setting("distill", rank=rank, world_size=2), tmp_path)
    clock = count(100.0, seconds)
    monkeypatch.setattr(base, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with starting(here, "the critic"):
        pass
    assert folder.said(0)[0] == wanted


@pytest.mark.usefixtures("distill_networks")
def test_distill_says_which_network_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_LONG_SECONDS", -1.0)
    here, folder = told(setting("distill"), tmp_path)
    DistillTraining(here, model(PlainNetwork()))
    said = [line.removeprefix("start: ").split(" took")[0] for line in folder.said(0)[0]]
    assert said == ["the generator", "the teacher", "the critic", "the average"]
