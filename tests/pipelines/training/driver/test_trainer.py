"""How a stage becomes a job, and what the cluster must have for it."""

from __future__ import annotations

import os
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.torch import TorchTrainer

from data.manifest import DatasetInfo, dataset_hash, read_dataset_info
from data.shards import write_dataset
from modeling.fingerprint import model_fingerprint
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig
from pipelines.training import trainer as module
from pipelines.training.follower import Follower
from pipelines.training.job import Job, make_job, trained_at
from pipelines.training.run_folder import RunFolder, TrainingError
from pipelines.training.taught import summary
from pipelines.training.told import ListeningTorch
from pipelines.training.trainer import _finished, _workers, train_stage
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
        "models": {"teacher": tiny_model},
    }


def test_a_job_is_plain_values_and_absolute_paths(
    given: dict[str, Any], tiny_model: Path, heldout: str, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    given |= {
        "start": Path(tiny_model.name),
        "models": {"teacher": Path(tiny_model.name)},
        "key": "k" * 64,
        "same": "s" * 64,
        "heldout": "pairs",
    }
    given["config"].output = "out"
    given["output"] = Path("out/model")
    job = make_job(**given)
    assert pickle.loads(pickle.dumps(job)) == job  # as it comes to a worker
    assert job.config == given["config"]
    assert job.start == job.models["teacher"] == tiny_model
    assert job.output == tiny_model.parent / "out" / "model"
    assert job.heldout == str(tiny_model.parent / "pairs")
    assert job.folder == tiny_model.parent / "out" / "checkpoints" / f"distill-{'s' * 12}"
    assert (job.stage, job.dataset) == ("distill", heldout)
    card = job.card
    assert (card["stage"], card["key"]) == ("distill", "k" * 64)
    assert card["parent"]["fingerprint"] == model_fingerprint(tiny_model)
    assert card["dataset"]["hash"] == dataset_hash(read_dataset_info(heldout))
    assert card["teacher"] == tiny_model.name
    assert card["config"]["learning_rate"] == given["config"].distill.learning_rate
    assert card["seed"] == given["config"].seed
    assert card["commit"]
    info = read_dataset_info(heldout)
    assert card["trained_at"] == [f"{info.width}x{info.height}"]
    teaches = replace(info, kind="encoded", made_by={"taught": summary(Counter(["add fog"]))})
    with monkeypatch.context() as encoded:
        encoded.setattr("pipelines.training.job.read_dataset_info", lambda uri: teaches)
        assert make_job(**given).card["prompts"] == ["add fog"]
    monkeypatch.setattr("pipelines.training.job.read_dataset_info", lambda uri: info)
    given |= {"dataset": "s3://bucket/set", "models": {}}
    assert make_job(**given).dataset == "s3://bucket/set"
    assert make_job(**given).models == {}
    assert make_job(**given).card["teacher"] is None


def test_a_training_goes_on_only_from_one_with_the_same_start_data_losses_and_draws(
    given: dict[str, Any], tmp_path: Path
) -> None:
    def folder(**changes: Any) -> str:
        return str(make_job(**{**given, **changes}).folder)

    def config(**changes: Any) -> PipelineConfig:
        return replace(given["config"], **changes)

    def distill(**changes: Any) -> PipelineConfig:
        return config(distill=replace(given["config"].distill, **changes))

    other = Path(shutil.copytree(given["start"], tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    write_dataset(str(tmp_path / "set"), [small_encoded(1)], made_by={})
    folders = {
        "the same": folder(),
        "start": folder(start=other),
        "dataset": folder(dataset=str(tmp_path / "set")),
        "teacher": folder(models={"teacher": other}),
        "stage": folder(stage="causal"),
        "seed": folder(config=config(seed=5)),
        "the stage's seed": folder(config=distill(seed=5)),
        "guidance": folder(config=distill(guidance=1.0)),
        "average": folder(config=distill(ema_decay=0.5)),
        "turns": folder(config=distill(generator_every=7)),
    }
    assert len(set(folders.values())) == len(folders), folders
    for value in folders.values():
        assert Path(value).parent == tmp_path / "out" / "checkpoints"

    may_change: dict[str, Any] = {
        "steps": 9000,
        "learning_rate": 0.5,
        "critic_learning_rate": 0.5,
        "final_learning_rate": 0.5,
        "warmup_steps": 77,
        "batch_size": 7,
        "grad_accumulation": 77,
        "weight_decay": 0.5,
        "betas": (0.5, 0.6),
        "grad_clip": 77.0,
        "log_every": 77,
        "checkpoint_every": 77,
        "checkpoint_minutes": 77.0,
    }
    for name, value in may_change.items():
        assert getattr(given["config"].distill, name) != value, name
        assert folder(config=distill(**{name: value})) == folders["the same"], name
    assert folder(config=config(vae=replace(given["config"].vae, steps=1))) == folders["the same"]
    # Another sharding finds the checkpoint too; loading it says what does not fit.
    for compute in (ComputeConfig(zero_stage=3), ComputeConfig(workers=5)):
        assert folder(config=config(compute=compute)) == folders["the same"]
    assert folder(output=tmp_path / "elsewhere") == folders["the same"]
    assert folder(key="k" * 64) == folders["the same"]


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


def test_workers_that_the_cluster_gives_must_make_whole_groups(monkeypatch: Any) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8, "GPU": 3})
    with pytest.raises(ConfigError, match=r"sequence_parallel=2 does not divide .*workers=3"):
        _workers(ComputeConfig(sequence_parallel=2))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)


@pytest.mark.usefixtures("no_ray")
def test_a_finished_stage_leaves_its_model_and_no_checkpoints(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Job] = []
    clock = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def fit(job: Job, folder: RunFolder, follow: Any) -> dict[str, Any]:
        assert folder.path == job.folder
        assert folder.path.is_dir()
        assert folder.reports(0) == ([], 0)  # of an earlier try nothing is left
        assert follow.stage == "distill"
        clock[0] += 12.0
        seen.append(job)
        return {"metrics": {"loss": 1.0}, "steps": 9}

    monkeypatch.setattr(module, "_fit", fit)
    outcome = train_stage(make_job(**given))
    assert (outcome.model_dir, outcome.metrics) == (given["output"], {"loss": 1.0})
    assert (outcome.steps, outcome.seconds) == (9, 12.0)
    assert seen == [make_job(**given)]
    assert not seen[0].folder.exists()
    given["config"].compute.keep_finished = True  # so that more steps can be added to it
    train_stage(make_job(**given))
    assert seen[1].folder.is_dir()


@pytest.mark.usefixtures("no_ray")
def test_what_the_workers_refused_is_raised_and_keeps_the_checkpoints(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_fit", lambda *args: {"refused": "lower it"})
    with pytest.raises(TrainingError, match=r"^lower it$"):
        train_stage(make_job(**given))
    assert make_job(**given).folder.is_dir()


@pytest.mark.usefixtures("no_ray")
def test_that_it_begins_anew_beside_checkpoints_of_another_training_is_said(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_job(**given).folder
    other = folder.with_name("distill-other")
    (other / "checkpoint_1").mkdir(parents=True)
    folder.with_name("distill-empty").mkdir()  # from which nothing could go on
    monkeypatch.setattr(module, "_fit", lambda *args: {"refused": "lower it"})

    def said() -> list[str]:
        heard: list[str] = []
        with pytest.raises(TrainingError, match="lower it"):
            train_stage(make_job(**given), say=heard.append)
        return heard

    (line,) = said()
    assert line.startswith(f"distill: begins anew; what was interrupted in {other} had another")
    assert (other / "checkpoint_1").is_dir()
    (folder / "checkpoint_1").mkdir()
    assert said() == []  # it does not begin anew


def test_ray_is_told_what_compute_says(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    folder = RunFolder(tmp_path / "distill-1")
    folder.open()
    follow = Follower("distill", folder, lambda report: None, lambda text: None)

    class Trainer(TorchTrainer):
        def __init__(self, loop: Any, **told: Any) -> None:
            made.append(SimpleNamespace(**told))
            super().__init__(loop, **told)

        def fit(self) -> Any:
            watched.append(os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"))
            assert module._RAY_TRAIN_ENV.items() <= os.environ.items()
            made[-1].callbacks = {type(c).__name__ for c in self._create_default_callbacks()}
            return SimpleNamespace(return_value={"steps": 3})

    watched: list[str | None] = []
    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8, "GPU": 3})
    for compute in (
        ComputeConfig(),
        ComputeConfig(
            workers=2, gpus=False, keep_checkpoints=5, max_failures=4, cpus_per_worker=0.5
        ),
        ComputeConfig(address="10.0.0.1:6379"),
    ):
        given["config"] = replace(given["config"], compute=compute)
        assert module._fit(make_job(**given), folder, follow) == {"steps": 3}
    assert watched == ["0", "0", None]  # a cluster's machines may be taken away
    plain, told, _ = made
    assert plain.run_config.checkpoint_config.num_to_keep == 2  # should the newest be damaged
    assert (plain.scaling_config.num_workers, plain.scaling_config.use_gpu) == (3, True)
    assert told.run_config.checkpoint_config.num_to_keep == 5
    assert told.run_config.failure_config.max_failures == 4
    assert (told.scaling_config.num_workers, told.scaling_config.use_gpu) == (2, False)
    assert plain.scaling_config.resources_per_worker == {"CPU": 1.0, "GPU": 1.0}
    assert told.scaling_config.resources_per_worker == {"CPU": 0.5}
    for one in made:  # where `RunFolder.checkpoints` looks for them
        where = Path(one.run_config.storage_path) / one.run_config.name
        assert where == folder.path
        assert one.train_loop_config["job"].stage == "distill"
        assert isinstance(one.torch_config, ListeningTorch)
        assert {"BackendSetupCallback", "WorkerMetricsCallback"} <= one.callbacks
        assert "DatasetsCallback" not in one.callbacks  # a process for nothing
    # Who lives on when a controller was killed must have its places back.
    cleaner = "PlacementGroupCleanerCallback"
    assert [cleaner in one.callbacks for one in made] == [False, False, True]
    assert not module._RAY_TRAIN_ENV.keys() & os.environ.keys()
    usual = {type(c).__name__ for c in TorchTrainer(print)._create_default_callbacks()}
    assert {cleaner, "DatasetsCallback"} <= usual, "Ray starts them by another name"


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [
        ("causal", None, ["224x128"]),
        ("causal", ["64x32"], ["64x32", "224x128"]),
        ("distill", ["224x128", "64x32"], ["64x32", "224x128"]),
        ("vae", ["64x32"], ["64x32"]),  # the transformer has seen nothing
        ("vae", None, []),
    ],
)
def test_a_model_says_at_which_sizes_it_was_trained(
    stage: str, before: list[str] | None, after: list[str]
) -> None:
    info = DatasetInfo(1, "pairs", 1, 16.0, 33, 128, 224, (), {})
    card = {} if before is None else {"trained_at": before}
    assert trained_at(card, stage, info) == after


@pytest.mark.parametrize(("same", "steps", "told"), [("x", 9, 4), ("x", 4, None), ("y", 9, None)])
def test_more_steps_of_a_finished_stage_are_known(
    tmp_path: Path, same: str, steps: int, told: int | None
) -> None:
    config = PipelineConfig()
    config.causal.steps = steps
    job = Job("causal", config, tmp_path, "", tmp_path, tmp_path, card={"same": same})
    assert _finished(job) is None
    (tmp_path / "card.json").write_text('{"same": "x", "steps": 4}')
    assert _finished(job) == told
