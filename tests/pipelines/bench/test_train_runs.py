"""What the benchmarks of training run, one case after the other, and what they report of it; the
trainings themselves are scripted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from data.loader import Split, loader
from data.manifest import read_dataset_info
from infra.runtime.errors import UserError
from pipelines.bench import train, training_worker
from pipelines.bench.drawn import SHARD, draw_dataset, draw_pair
from pipelines.bench.train import TrainOptions, _describe, summary
from pipelines.bench.training_worker import SAMPLES, WARM_UP, TrainCase
from pipelines.config.load import from_plain, load_config, to_plain
from pipelines.training.run_folder import TrainingReport
from tests.pipelines.bench.test_train_figures import SMALL

CPU = torch.device("cpu")


def options(**given: Any) -> TrainOptions:
    config = load_config("demo", SMALL)
    usual = {"stages": ("foundation", "causal"), "workers": (1,), "zero": (2,), "steps": 3}
    return TrainOptions(config, False, **usual | given)


def step(seconds: float, tflops: float, mfu: float | None, wait: float, loss: float) -> Any:
    found = {"seconds_per_step": seconds, "tflops": tflops, "data_seconds_per_step": wait,
             "loss": loss, "gpu_memory_gib": 10 * loss}  # fmt: skip
    return found if mfu is None else found | {"mfu": mfu}


def test_a_case_by_hand() -> None:
    """Of steps of 1 and 3 seconds the rates weigh by their time; the last step's loss counts."""
    case = {"stage": "causal", "workers": 2, "zero": 3, "start_s": 9.0}
    steps = [step(1.0, 4.0, 0.4, 0.1, 6.0), step(3.0, 2.0, 0.2, 0.3, 5.0)]
    assert summary({**case, "steps": steps}) == {
        **case,
        "name": "causal, 2 workers, ZeRO-3",
        "seconds": 2.0,
        "seconds_of_steps": [1.0, 3.0],
        "model_tflop": 5.0,
        "tflops": 2.5,
        "mfu": pytest.approx(0.25),
        "data_wait_s": pytest.approx(0.2),
        "reserved_gib": 50.0,
        "loss": 5.0,
    }
    plain = step(1.0, 4.0, None, 0.1, 6.0)
    del plain["gpu_memory_gib"]  # as on a CPU
    found = summary({**case, "steps": [plain]})
    assert (found["mfu"], found["reserved_gib"]) == (None, None)


def test_cases_come_by_workers_and_what_decides_their_work_is_described() -> None:
    asked = options(workers=(2, 1), zero=(2, 3), steps=4)
    assert [(c.workers, c.stage, c.zero) for c in asked.cases] == [
        (workers, stage, zero)
        for workers in (2, 1) for stage in ("foundation", "causal") for zero in (2, 3)
    ]  # fmt: skip
    told = _describe(asked)
    config = asked.config
    assert told["cases"] == [case.name for case in asked.cases]
    assert (told["height"], told["width"], told["frames"], told["steps"]) == (32, 48, 21, 4)
    assert told["model"] == "demo"
    assert told["transformer"]["dim"] == config.model.resolve().transformer.dim
    assert told["batch_size"] == {
        stage: getattr(config, stage).batch_size for stage in ("foundation", "causal")
    }
    assert set(told["compute"]) == {
        "precision", "activation_checkpointing", "deterministic", "loader_workers",
        "sequence_parallel",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stages": ("vae", "causal", "x")}, "--stages vae,x cannot be timed; choose of found"),
        ({"steps": 0}, "--steps 0 times nothing"),
        ({"cuda": True, "workers": (1, 9)}, "--gpus 9, but this machine has 8; take fewer"),
        ({"zero": (2, 4)}, "zero_stage=4"),
        ({"overrides": ["compute.sequence_parallel=2"], "workers": (4, 3)}, "sequence_parallel=2"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    usual = {"stages": ("causal",), "workers": (2,), "zero": (2,), "steps": 1, "cuda": False}
    asked = usual | given
    config = load_config("demo", [*SMALL, *asked.pop("overrides", [])])
    TrainOptions(config, **usual | {"cuda": True, "workers": (8,)})  # as many as there are
    with pytest.raises(UserError, match=words):
        TrainOptions(config, **asked)


def test_what_does_not_fit_into_memory_leaves_the_other_cases_to_be_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: list[list[str]] = []

    def run(asked: Any, cases: list[TrainCase], folder: Path) -> Iterator[dict[str, Any]]:
        groups.append([case.name.partition(",")[0] for case in cases])
        machine = {"hardware": {"device": "a cpu"}, "yardstick": {"tflops": 8.0}}
        (folder / "machine.json").write_text(json.dumps(machine))
        for case in cases:
            full = case.stage == "causal"
            about = {"stage": case.stage, "workers": 1, "zero": 2, "out_of_memory": full}
            yield about if full else about | {"steps": [step(2.0, 4.0, None, 0.0, 1.0)]}
            if full:
                return

    monkeypatch.setattr(train, "_run", run)
    checked: list[Any] = []
    said: list[str] = []
    asked = options(stages=("foundation", "causal", "distill"))
    reports = [
        [case["name"].partition(",")[0] for case in report["cases"]]
        for report in train.measure(asked, lambda r: checked.append(dict(r)), said.append)
    ]
    assert groups == [["foundation", "causal", "distill"], ["distill"]]
    assert reports == [
        ["foundation"], ["foundation", "causal"], ["foundation", "causal", "distill"],
    ]  # fmt: skip
    assert [one["cases"] for one in checked] == [[]], "asked once, before anything starts"
    assert said[:2] == [
        "foundation, 1 workers, ZeRO-2; 3 cases to do",
        "after foundation, 1 workers, ZeRO-2; 2 cases to do",
    ]
    *_, last = train.measure(asked)
    assert last["hardware"] == {"device": "a cpu"}
    assert last["ratios"]["foundation, 1 workers, ZeRO-2 / matrix products"]["value"] == 2.0


class Group:
    """In the place of a group of processes: at each look that is taken at it, it has written the
    next lines; an error is one that a process ended with."""

    def __init__(self, *looks: list[int] | Exception) -> None:
        self.looks = list(looks)
        self.killed = 0
        self.started: list[Any] = []
        process = SimpleNamespace(kill=lambda: setattr(self, "killed", self.killed + 1))
        self.processes = [process] * 2

    def spawn(self, *given: Any, **named: Any) -> Group:
        self.started.append((given, named))
        (job,) = named["args"]
        self.results = Path(job["folder"], f"results-{job['group']}.jsonl")
        return self

    def join(self, timeout: float) -> bool:
        look = self.looks.pop(0)
        if isinstance(look, Exception):
            self.write([-1])
            raise look
        self.write(look)
        return not self.looks

    def write(self, numbers: list[int]) -> None:
        with self.results.open("a") as file:
            for n in numbers:
                file.write(json.dumps({"n": n, "out_of_memory": n < 0}) + "\n")


def group_of(monkeypatch: pytest.MonkeyPatch, *looks: list[int] | Exception) -> Group:
    group = Group(*looks)
    monkeypatch.setattr(train, "spawn", group.spawn)
    return group


def test_processes_tell_each_case_once_as_it_is_done_and_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(monkeypatch, [], [0, 1], [2])
    asked = options(workers=(2,))
    told = train._run(asked, asked.cases, tmp_path)
    for n in range(3):
        assert next(told)["n"] == n
        assert len(group.looks) == (1 if n < 2 else 0), "the others are not waited for"
        assert group.killed == 0
    assert list(told) == []
    assert group.killed == 2
    (((work,), named),) = group.started
    assert work is training_worker.work
    assert (named["nprocs"], named["join"]) == (2, False)
    (job,) = named["args"]
    assert job["cases"] == [asdict(case) for case in asked.cases]
    assert (job["cuda"], job["folder"]) == (False, str(tmp_path))
    assert from_plain(job["config"]) == asked.prepared()
    group = group_of(monkeypatch, [0], [1])
    told = train._run(asked, asked.cases, tmp_path)
    next(told)
    told.close()  # type: ignore[attr-defined]
    assert group.killed == 2, "whoever listens may leave"


def test_only_a_process_without_memory_ends_its_group_in_peace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ProcessRaisedException("full", 0, 1)
    asked = options()
    group = group_of(monkeypatch, [0], error)
    assert [found["n"] for found in train._run(asked, asked.cases, tmp_path)] == [0, -1]
    assert group.killed == 2
    group = group_of(monkeypatch, [0], error)
    monkeypatch.setattr(group, "write", lambda numbers: Group.write(group, [1]))
    with pytest.raises(ProcessRaisedException):
        list(train._run(asked, asked.cases, tmp_path))
    assert group.killed == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("a fault")])
def test_a_worker_that_fails_ends_its_group_and_says_only_that_memory_was_short(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it held is not given back, so that a later case in its process would fail, too."""
    asked = options(stages=("foundation", "causal", "distill"))
    cases = [asdict(case) for case in asked.cases]
    places: list[str] = []

    def run(case: TrainCase, config: Any, place: Path, *_: Any) -> dict[str, Any]:
        places.append(place.name)
        if case.stage == "causal":
            raise error
        return {"start_s": 1.0}

    monkeypatch.setattr(training_worker, "_run", run)
    monkeypatch.setattr(training_worker, "_prepare", lambda *_: None)
    job = {"cases": cases, "config": to_plain(asked.prepared()), "cuda": False,
           "folder": str(tmp_path), "group": "g"}  # fmt: skip
    with pytest.raises(type(error)):
        training_worker.work(0, job)
    assert not torch.distributed.is_initialized()
    assert places == ["case-g-0", "case-g-1"]
    short = isinstance(error, torch.OutOfMemoryError)
    told = [cases[0] | {"out_of_memory": False, "start_s": 1.0}]
    told += [cases[1] | {"out_of_memory": True}] * short
    results = tmp_path / "results-g.jsonl"
    assert [json.loads(line) for line in results.read_text().splitlines()] == told
    assert train._out_of_memory(results) == short


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_times_the_steps_after_the_warm_up(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    destroyed: list[str] = []

    class Training:
        def __init__(self, setting: Any, folder: Any) -> None:
            seen.append((setting, folder))
            self.folder = folder
            engine = SimpleNamespace(destroy=lambda: destroyed.append("engine"))
            self.stage = SimpleNamespace(engines={"one": engine, "two": engine})

        def train(self, keep: Callable[..., None]) -> None:
            with pytest.raises(AssertionError, match="saved its state at step 7"):
                keep(lambda path: None, 7)
            if rank == 0:
                for n in range(WARM_UP + 3):
                    self.folder.report(TrainingReport(n + 1, 5, {"loss": float(n)}, 1.0))

    monkeypatch.setattr(training_worker, "Training", Training)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    shared, place = tmp_path / "shared", tmp_path / "case"
    config = load_config("demo", SMALL)
    case = TrainCase("distill", 2, 3)
    found = training_worker._run(case, config, place, shared, rank, CPU)
    assert found.pop("start_s") >= 0
    wanted = [{"loss": float(n)} for n in range(WARM_UP, WARM_UP + 3)] if rank == 0 else []
    assert found == {"allocated_gib": None, "steps": wanted}
    ((setting, folder),) = seen
    job = setting.job
    assert (setting.rank, setting.world_size, job.stage) == (rank, 2, "distill")
    assert job.config.compute.zero_stage == 3
    assert (job.start, job.models) == (shared / "model", {"teacher": shared / "model"})
    assert (job.dataset, job.folder, folder.path) == (str(shared / "encoded"), place, place)
    assert destroyed == ["engine"] * 2


@pytest.mark.parametrize(("batch", "workers", "samples"), [(1, 2, SAMPLES), (3, 4, 24)])
def test_what_all_cases_share_is_drawn_once_and_is_two_batches_for_each_worker(
    batch: int, workers: int, samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(training_worker, "draw_model", lambda *given: drawn.append(given[0]))
    monkeypatch.setattr(
        training_worker, "draw_dataset", lambda folder, *given: drawn.append((folder, *given[1:]))
    )
    monkeypatch.setattr(training_worker, "hardware", lambda device: {"device": "a"})
    monkeypatch.setattr(training_worker, "yardstick", lambda device: {"ms": 1.0})
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: workers)
    config = load_config("demo", [*SMALL, "causal.batch_size=1", f"distill.batch_size={batch}",
                                  "foundation.batch_size=1"])  # fmt: skip
    for _ in range(2):
        training_worker._prepare(tmp_path, config, CPU)
    assert drawn == [tmp_path / "model", (tmp_path / "encoded", 21, samples)]
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine == {"hardware": {"device": "a"}, "yardstick": {"ms": 1.0}}


def test_drawn_clips_are_of_the_models_sizes_and_all_unlike(tmp_path: Path) -> None:
    pair = draw_pair(3, 21, (32, 48), (5, 8))
    assert pair.source.shape == pair.target.shape == (6, 16, 4, 6)
    assert pair.text.shape == (5, 8)
    assert (pair.video_shape, pair.source.dtype) == ((21, 32, 48), np.float16)
    assert not np.array_equal(pair.source, pair.target)
    assert np.array_equal(draw_pair(3, 21, (32, 48), (5, 8)).text, pair.text)
    config = load_config("demo", SMALL).model.resolve()
    draw_dataset(tmp_path / "set", config, 21, SHARD + 1)
    info = read_dataset_info(str(tmp_path / "set"))
    assert (info.samples, info.frames, info.height, info.width) == (SHARD + 1, 21, 32, 48)
    assert len(info.shards) == 2
    split = Split(batch_size=1, shuffle=False, epochs=1)
    batches = list(loader(str(tmp_path / "set"), split))
    assert len({float(batch["source"].float().sum()) for batch in batches}) == SHARD + 1
    assert batches[0]["text"].shape[1:] == (config.text.tokens, config.text.dim)
