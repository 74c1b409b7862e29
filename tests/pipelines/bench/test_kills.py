"""Workers that are killed: by whom, when and how, and what is compared afterwards; the trainings
themselves are scripted."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from data.manifest import read_dataset_info
from infra.runtime.errors import UserError
from modeling.model_dir import read_config
from pipelines.bench import kills
from pipelines.bench.drawn import draw_model
from pipelines.bench.kills import SAVE_EVERY, Kill, Killer, worker_processes
from pipelines.config.load import load_config
from pipelines.training.run_folder import TrainingReport
from tests.pipelines.bench.test_train_figures import SMALL

CPU = torch.device("cpu")
SIZES = ("dim=128", "ffn_dim=16", "num_heads=1", "num_layers=1")
SMALLEST = [*SMALL, *(f"model.transformer.{size}" for size in SIZES)]


def test_kills_fall_on_any_worker_at_drawn_steps_and_tell_what_they_cost() -> None:
    clock, killed = [100.0], []
    killer = Killer(
        [2, 5, 6],
        random.Random(4),
        ("kill", "term"),
        kill=lambda pid, number: killed.append((pid, number)),
        workers=lambda pid: [pid, pid + 1],
        clock=lambda: clock[0],
    )

    def report(step: int, pid: int) -> None:
        clock[0] += 1
        killer(TrainingReport(step, 9, {}, 0.1, pid=pid))

    for step in (1, 2, 3):
        report(step, 40)  # the third was on its way when the worker died
    clock[0] += 10
    for step in (1, 2, 3, 4, 7):  # the one that is read comes too late for both
        report(step, 50)
    report(8, 50)  # whose neighbour was killed: Ray ends both
    for step in (4, 5, 6, 7, 8, 9):
        report(step, 60)
    assert [(kill.step, kill.from_step, kill.lost) for kill in killer.kills] == [
        (2, 0, 13.0),
        (7, 3, 5.0),
    ]
    assert [pid // 10 for pid, _ in killed] == [4, 5]
    assert [pid % 10 for pid, _ in killed] == [kill.worker for kill in killer.kills]
    assert [number for _, number in killed] == [signal.SIGKILL, signal.SIGTERM]
    assert [kill.signal for kill in killer.kills] == ["kill", "term"]
    assert {kill.worker for kill in killer.kills} == {0, 1}  # as seed 4 draws


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `kills.measure` drew and trained, by a script: 30 s alone, 50 s with kills."""
    events: list[Any] = []

    def train_one(config: Any, stage: str, folder: Path, name: str, follow: Any) -> float:
        events.append((name, config))
        if name == "killed":
            follow.kills.append(Kill(4, 1, "term", 2.0, 3, 8.0))
            events.append((follow.steps, follow.signals))
        return 30.0 if name == "alone" else 50.0

    monkeypatch.setattr(kills, "draw_model", lambda *given: None)
    monkeypatch.setattr(kills, "draw_dataset", lambda *given: events.append(given[2:]))
    monkeypatch.setattr(kills, "ray_session", lambda compute: nullcontext())
    monkeypatch.setattr(kills, "_train", train_one)
    monkeypatch.setattr(
        kills, "_different", lambda one, other: [one.parent.name, other.parent.name]
    )
    monkeypatch.setattr(kills, "hardware", lambda device: {"device": device.type})
    return events


def test_killed_and_left_alone_a_training_is_the_same(
    trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("demo", [*SMALL, "causal.batch_size=3", "causal.validate_every=2",
                                  "causal.keep_best=validation_gain", "causal.patience=3",
                                  "compute.address=ray://h:1"])  # fmt: skip
    signals = ("kill", "term")
    found = kills.measure(config, "causal", 2, 3, None, 5, signals)
    assert trained[0] == (21, 12)  # frames; two batches for each worker
    (_, alone), (_, killed) = trained[1:3]
    assert trained[3] == (found["planned"], signals)
    assert alone == killed
    section, compute = alone.causal, alone.compute
    assert (section.steps, section.log_every, section.checkpoint_every) == (40, 1, SAVE_EVERY)
    assert (section.validate_every, section.keep_best, section.patience) == (0, None, 0)
    assert section.batch_size == 3
    assert (compute.workers, compute.max_failures, compute.address) == (2, 3, None)
    assert compute.deterministic
    assert alone.distill == config.distill
    assert found["planned"] == sorted(set(found["planned"]))
    assert len(found["planned"]) == 3
    assert 2 <= found["planned"][0] <= found["planned"][-1] < 40
    wanted = {"stage": "causal", "workers": 2, "steps": 40, "save_every": SAVE_EVERY, "seed": 5,
              "seconds_alone": 30.0, "seconds_killed": 50.0, "hardware": {"device": "cpu"},
              "different": ["alone", "killed"]}  # fmt: skip
    assert wanted.items() <= found.items()
    kill = {"step": 4, "worker": 1, "signal": "term", "at": 2.0, "from_step": 3, "lost": 8.0}
    assert found["kills"] == [kill]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    again = kills.measure(config, "causal", 2, 3, None, 5)
    assert again["hardware"] == {"device": "cuda"}, "on which it trains where there is one"
    assert again["planned"] == found["planned"]
    assert kills.measure(config, "causal", 2, 3, None, 6)["planned"] != found["planned"]
    for seed in range(9):  # as many as fit: none in the first step, where nothing runs yet
        assert kills.measure(config, "causal", 1, 2, 4, seed)["planned"] == [2, 3]
    with pytest.raises(UserError, match="--kills 3 do not fit into 4 steps"):
        kills.measure(config, "causal", 1, 3, 4, 5)


def test_weights_that_are_not_the_same_bits_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = load_config("demo", SMALLEST).model.resolve()
    for name in ("one", "same", "other"):
        draw_model(tmp_path / name, config, CPU)
    assert kills._different(tmp_path / "one", tmp_path / "same") == []
    file = tmp_path / "other" / "transformer.safetensors"
    weights = load_file(file)
    weights["head.head.bias"][0] += 1
    save_file(weights, file)
    assert kills._different(tmp_path / "one", tmp_path / "other") == ["head.head.bias"]


def test_all_workers_beside_one_are_found_by_what_ray_calls_them() -> None:
    code = "import time; time.sleep(60)"
    names = ("ray::Worker.run", "ray::Worker.idle", "ray::Other.run", "Elsewhere")
    children = [subprocess.Popen([name, "-c", code], executable=sys.executable) for name in names]
    try:
        ours = [child.pid for child in children[:2]]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            ready = all(
                psutil.Process(child.pid).cmdline()[:1] == [name]  # empty until it has begun
                for child, name in zip(children, names, strict=True)
            )
            if ready:
                break
            time.sleep(0.02)
        assert worker_processes(ours[0]) == worker_processes(ours[1]) == sorted(ours)
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.mark.parametrize("stage", ["causal", "distill"])
def test_both_trainings_begin_with_the_same_model_and_pairs(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And write to places of their own; only distillation has a teacher."""
    jobs: list[Any] = []

    def train(job: Any, on_progress: Any, say: Any) -> Any:
        jobs.append(job)
        assert isinstance(on_progress, Killer) == (len(jobs) == 2)
        assert read_config(job.start).transformer.dim == 128
        assert read_dataset_info(job.dataset).samples == 8
        shutil.copytree(job.start, job.output)
        return SimpleNamespace(seconds=10.0 * len(jobs))

    monkeypatch.setattr(kills, "train_stage", train)
    monkeypatch.setattr(kills, "ray_session", lambda compute: nullcontext())
    config = load_config("demo", SMALLEST)
    found = kills.measure(config, stage, 1, 1, 4, 0)
    assert (found["different"], found["kills"]) == ([], [])
    assert (found["seconds_alone"], found["seconds_killed"]) == (10.0, 20.0)
    alone, killed = jobs
    assert (alone.start, alone.dataset) == (killed.start, killed.dataset)
    assert alone.models == killed.models == ({"teacher": alone.start} if stage == "distill" else {})
    assert alone.stage == killed.stage == stage
    assert len({job.folder for job in jobs}) == len({job.output for job in jobs}) == 2
    assert not alone.start.exists(), "all of it is put away"


def test_a_worker_that_ends_while_it_is_looked_at_hides_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def process(pid: int, *words: str) -> Any:
        def command() -> list[str]:
            if not words:
                raise psutil.NoSuchProcess(pid)
            return list(words)

        return SimpleNamespace(pid=pid, cmdline=command, parent=lambda: parent)

    three, two = process(3, "ray::Worker.run"), process(2, "ray::Worker.run")
    parent: Any = SimpleNamespace(children=lambda: [three, process(1), two])
    monkeypatch.setattr(kills.psutil, "Process", lambda pid: three)
    assert worker_processes(3) == [2, 3]
    parent = None  # one that its parent has left is alone
    assert worker_processes(3) == [3]
