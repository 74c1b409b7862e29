"""How a stage becomes a job, what the cluster must have for it, and which errors come back."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from data.manifest import dataset_hash, read_dataset_info
from data.shards import write_dataset
from modeling.fingerprint import model_fingerprint
from pipelines.config.load import from_plain
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig
from pipelines.training import trainer as module
from pipelines.training.run_folder import RunFolder, TrainingError
from pipelines.training.trainer import _in_thread, _plain_error, _workers, make_job, train_stage
from tests.data.conftest import small_encoded


@pytest.fixture
def given(tmp_path: Path, tiny_model: Path, heldout: str) -> dict[str, Any]:
    config = PipelineConfig(output=str(tmp_path / "out"))
    return {
        "stage": "distill",
        "config": config,
        "start": tiny_model,
        "dataset": heldout,
        "output": tmp_path / "out" / "models" / "distill",
        "extra": {"teacher": tiny_model},
    }


def test_a_job_is_plain_values_and_absolute_paths(
    given: dict[str, Any], tiny_model: Path, heldout: str, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    given |= {
        "start": Path(tiny_model.name),
        "extra": {"teacher": tiny_model.name, "key": "k" * 64},
    }
    given["config"].output = "out"
    given["output"] = Path("out/model")
    job = make_job(**given)
    assert from_plain(job["config"]) == given["config"]
    assert job["start"] == job["models"]["teacher"] == str(tiny_model)
    assert job["output"] == str(tiny_model.parent / "out" / "model")
    assert job["folder"] == str(tiny_model.parent / "out" / "checkpoints" / f"distill-{'k' * 12}")
    assert (job["stage"], job["dataset"]) == ("distill", heldout)
    card = job["card"]
    assert (card["stage"], card["key"]) == ("distill", "k" * 64)
    assert card["parent"]["fingerprint"] == model_fingerprint(tiny_model)
    assert card["dataset"]["hash"] == dataset_hash(read_dataset_info(heldout))
    assert card["teacher"] == tiny_model.name
    assert card["config"]["learning_rate"] == given["config"].distill.learning_rate
    assert card["seed"] == given["config"].seed
    assert card["commit"]
    info = read_dataset_info(heldout)
    monkeypatch.setattr(module, "read_dataset_info", lambda uri: info)
    given |= {"dataset": "s3://bucket/set", "extra": {}}
    assert make_job(**given)["dataset"] == "s3://bucket/set"
    assert make_job(**given)["models"] == {}
    assert make_job(**given)["card"]["teacher"] is None


def test_only_the_very_same_training_goes_on_from_its_checkpoints(
    given: dict[str, Any], tmp_path: Path
) -> None:
    def folder(**changes: Any) -> str:
        return str(make_job(**{**given, **changes})["folder"])

    def config(**changes: Any) -> PipelineConfig:
        return replace(given["config"], **changes)

    other = Path(shutil.copytree(given["start"], tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    write_dataset(str(tmp_path / "set"), [small_encoded(1)], made_by={})
    folders = {
        "the same": folder(),
        "start": folder(start=other),
        "dataset": folder(dataset=str(tmp_path / "set")),
        "teacher": folder(extra={"teacher": other}),
        "stage": folder(stage="causal"),
        "seed": folder(config=config(seed=5)),
        "setting": folder(config=config(distill=replace(given["config"].distill, guidance=1.0))),
        "compute": folder(config=config(compute=ComputeConfig(zero_stage=3))),
    }
    assert len(set(folders.values())) == len(folders), folders
    assert folder() == folders["the same"]
    assert folder(config=config(vae=replace(given["config"].vae, steps=1))) == folders["the same"]
    assert folder(output=tmp_path / "elsewhere") == folders["the same"]


CLUSTERS: list[tuple[dict[str, float], dict[str, Any], tuple[int, bool]]] = [
    ({"CPU": 4}, {}, (2, False)),
    ({"CPU": 4}, {"workers": 4}, (4, False)),
    ({"CPU": 2}, {"workers": 4, "cpus_per_worker": 0.5}, (4, False)),
    ({"CPU": 8, "GPU": 3}, {}, (3, True)),
    ({"CPU": 8, "GPU": 3}, {"workers": 2}, (2, True)),
    ({"CPU": 8, "GPU": 3}, {"workers": 3, "gpus": True}, (3, True)),
    ({"CPU": 8, "GPU": 1}, {"gpus": False}, (2, False)),
]


@pytest.mark.parametrize(("resources", "compute", "expected"), CLUSTERS)
def test_workers_and_gpus(
    resources: dict[str, float],
    compute: dict[str, Any],
    expected: tuple[int, bool],
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    assert _workers(ComputeConfig(**compute)) == expected


@pytest.mark.parametrize(
    ("resources", "compute", "words"),
    [
        (
            {"CPU": 8, "GPU": 3},
            {"workers": 4},
            r"compute.workers=4 with a GPU each, but .* has 3 GPUs; set compute.workers=3, or comp",
        ),
        ({"CPU": 8}, {"gpus": True, "workers": 1}, r"compute.workers=1 with a GPU .* has 0 GPUs"),
        ({"CPU": 1}, {}, r"compute.workers=2 with 1 CPUs each, but the Ray cluster has 1; lower"),
        ({"CPU": 4, "GPU": 2}, {"cpus_per_worker": 2.5}, r"workers=2 with 2.5 CPUs each.* has 4;"),
        ({}, {"workers": 1}, r"compute.workers=1 with 1 CPUs each, but the Ray cluster has 0"),
    ],
)
def test_a_cluster_that_has_less(
    resources: dict[str, float], compute: dict[str, Any], words: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    with pytest.raises(TrainingError, match=words):
        _workers(ComputeConfig(**compute))


def test_the_workers_own_error_comes_back_if_it_can_be_mended() -> None:
    mendable = ValueError("lower it")
    outer = RuntimeError("ray")
    outer.worker_failures = {0: RuntimeError("first"), 1: mendable}  # type: ignore[attr-defined]
    found = _plain_error(outer)
    assert isinstance(found, TrainingError)
    assert str(found) == "lower it"
    wrapped = RuntimeError("task")
    wrapped.cause = mendable  # type: ignore[attr-defined]
    outer.worker_failures = {0: wrapped}  # type: ignore[attr-defined]
    assert str(_plain_error(outer)) == "lower it"
    chained = RuntimeError("task")
    chained.__cause__ = mendable
    outer.worker_failures = {0: chained}  # type: ignore[attr-defined]
    assert str(_plain_error(outer)) == "lower it"
    outer.worker_failures = {0: RuntimeError("a stalled network")}  # type: ignore[attr-defined]
    assert _plain_error(outer) is outer
    alone = RuntimeError("ray")
    assert _plain_error(alone) is alone


class Followed:
    """What a follower is asked, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self) -> None:
        self.asked.append("follow")

    def let_checkpoint_finish(self) -> None:
        self.asked.append("wait")

    def where_it_goes_on(self) -> str:
        return "goes on from step 7"


def test_a_finished_fit_gives_what_the_first_worker_returned() -> None:
    follow = Followed()
    made = _in_thread(lambda: SimpleNamespace(return_value={"steps": 3}), follow)  # type: ignore
    assert made == {"steps": 3}
    assert follow.asked[-1] == "follow"  # the last reports are passed on


def test_a_failed_fit_raises_after_the_last_reports() -> None:
    def fit() -> Any:
        raise RuntimeError("lost")

    follow = Followed()
    with pytest.raises(RuntimeError, match="lost"):
        _in_thread(fit, follow)  # type: ignore[arg-type]
    assert follow.asked[-1] == "follow"


def test_ctrl_c_saves_ends_ray_and_says_where_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Followed):
        def __call__(self) -> None:
            raise KeyboardInterrupt

    follow = Interrupted()
    ended = threading.Event()

    def shutdown() -> None:
        follow.asked.append("shutdown")
        ended.set()

    monkeypatch.setattr(ray, "shutdown", shutdown)
    with pytest.raises(KeyboardInterrupt) as stopped:
        _in_thread(ended.wait, follow)  # type: ignore[arg-type]
    assert stopped.value.__notes__ == ["goes on from step 7"]
    assert follow.asked == ["wait", "shutdown"]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)


@pytest.mark.usefixtures("no_ray")
def test_a_finished_stage_leaves_its_model_and_no_checkpoints(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def fit(job: dict[str, Any], folder: RunFolder, compute: Any, follow: Any) -> dict[str, Any]:
        assert str(folder.path) == job["folder"]
        assert folder.path.is_dir()
        assert compute == given["config"].compute
        assert follow.stage == "distill"
        seen.append(job)
        return {"metrics": {"loss": 1.0}, "steps": 9}

    monkeypatch.setattr(module, "_fit", fit)
    outcome = train_stage(**given)
    assert (outcome.model_dir, outcome.metrics) == (given["output"], {"loss": 1.0})
    assert outcome.steps == 9
    assert seen == [make_job(**given)]
    assert not Path(seen[0]["folder"]).exists()


@pytest.mark.usefixtures("no_ray")
def test_what_the_workers_refused_is_raised_and_keeps_the_checkpoints(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_fit", lambda *args: {"refused": "lower it"})
    with pytest.raises(TrainingError, match=r"^lower it$"):
        train_stage(**given)
    assert Path(make_job(**given)["folder"]).is_dir()
