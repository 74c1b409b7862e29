"""How a stage becomes a job, what the cluster must have for it, and which errors come back."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, PreemptionError, WorkerGroupError

from data.manifest import dataset_hash, read_dataset_info
from data.shards import write_dataset
from infra.runtime.errors import UserError
from modeling.fingerprint import model_fingerprint
from pipelines.config.load import from_plain
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig
from pipelines.exits import TryAgainError
from pipelines.training import trainer as module
from pipelines.training.follower import Follower
from pipelines.training.run_folder import Progress, RunFolder, TrainingError
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
        "extra": {"teacher": tiny_model.name, "key": "k" * 64, "same": "s" * 64},
    }
    given["config"].output = "out"
    given["output"] = Path("out/model")
    job = make_job(**given)
    assert from_plain(job["config"]) == given["config"]
    assert job["start"] == job["models"]["teacher"] == str(tiny_model)
    assert job["output"] == str(tiny_model.parent / "out" / "model")
    assert job["folder"] == str(tiny_model.parent / "out" / "checkpoints" / f"distill-{'s' * 12}")
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


def test_a_training_goes_on_only_from_one_with_the_same_start_data_losses_and_draws(
    given: dict[str, Any], tmp_path: Path
) -> None:
    def folder(**changes: Any) -> str:
        return str(make_job(**{**given, **changes})["folder"])

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
        "teacher": folder(extra={"teacher": other}),
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
    assert folder(extra={**given["extra"], "key": "k" * 64}) == folders["the same"]


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


REPORT = Progress(3, 10, {"loss": 1.0}, 2.5)


@dataclass
class Run:
    """A folder that is followed, and in order what its listeners got and what became of it."""

    folder: RunFolder
    events: list[str] = field(default_factory=list)
    interrupted_by: str | None = None  # the event at which Ctrl-C comes

    @property
    def follow(self) -> Follower:
        return Follower("distill", self.folder, self.got, self.note)

    def got(self, report: Progress) -> None:
        self.note(f"step {report.step}")

    def note(self, event: str) -> None:
        self.events.append(event)
        if event == self.interrupted_by:
            raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = RunFolder(tmp_path / "distill-1")
    folder.open()
    return Run(folder)


def test_the_workers_own_error_comes_back_if_it_can_be_mended(run: Run) -> None:
    mendable = UserError("lower it")
    outer = RuntimeError("ray")
    outer.worker_failures = {0: RuntimeError("first"), 1: mendable}  # type: ignore[attr-defined]
    found = _plain_error(outer, run.follow)
    assert isinstance(found, TrainingError)
    assert str(found) == "lower it"
    wrapped = RuntimeError("task")
    wrapped.cause = mendable  # type: ignore[attr-defined]
    outer.worker_failures = {0: wrapped}  # type: ignore[attr-defined]
    assert str(_plain_error(outer, run.follow)) == "lower it"
    chained = RuntimeError("task")
    chained.__cause__ = mendable
    outer.worker_failures = {0: chained}  # type: ignore[attr-defined]
    assert str(_plain_error(outer, run.follow)) == "lower it"
    for other in (RuntimeError("a stalled network"), ValueError("a bug of ours")):
        outer.worker_failures = {0: other}  # type: ignore[attr-defined]
        assert _plain_error(outer, run.follow) is outer
    alone = RuntimeError("ray")
    assert _plain_error(alone, run.follow) is alone


def test_a_lost_worker_is_a_reason_to_try_again(run: Run) -> None:
    died = WorkerGroupError(
        "", {0: RuntimeError("connection closed by peer"), 1: RayActorError("node failed")}
    )
    found = _plain_error(died, run.follow)
    assert isinstance(found, TryAgainError)
    assert "lost worker 1 (RayActorError: " in str(found)
    assert str(found).endswith("from its beginning, with no checkpoint yet")
    for outer in (
        ControllerError(RuntimeError("no room")),
        PreemptionError(SimpleNamespace(preempted_ranks=[0])),  # type: ignore[arg-type]
    ):
        assert isinstance(_plain_error(outer, run.follow), TryAgainError)


def test_a_finished_fit_gives_what_the_first_worker_returned(run: Run) -> None:
    def fit() -> Any:
        run.folder.report(REPORT)
        return SimpleNamespace(return_value={"steps": 3})

    assert _in_thread(fit, run.follow) == {"steps": 3}
    assert run.events == ["step 3"]  # the last reports are passed on


def test_a_failed_fit_raises_after_the_last_reports(run: Run) -> None:
    def fit() -> Any:
        run.folder.report(REPORT)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        _in_thread(fit, run.follow)
    assert run.events == ["step 3"]


@pytest.fixture
def ray_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once Ray was shut down."""
    ended = threading.Event()

    def shutdown() -> None:
        run.note("shutdown")
        ended.set()

    monkeypatch.setattr(ray, "shutdown", shutdown)
    return ended


SAVING = "the state is being saved; Ctrl-C again leaves it"
STOPPED = "Stage distill was stopped; the same command goes on from "


def test_ctrl_c_has_the_state_saved_ends_ray_and_says_where_it_goes_on(
    run: Run, ray_ends: threading.Event
) -> None:
    def fit() -> Any:
        run.folder.report(REPORT)
        while not run.folder.is_to_stop() and not ray_ends.wait(0.01):
            pass
        saved = run.folder.path / "checkpoint_1"
        saved.mkdir()
        (saved / "manifest-0.json").write_text('{"step": 7}')
        run.events.append("saved")
        return SimpleNamespace(return_value={"stopped": 7})

    run.interrupted_by = "step 3"
    with pytest.raises(KeyboardInterrupt) as stopped:
        _in_thread(fit, run.follow)
    assert sorted(run.events[1:3]) == ["saved", SAVING]  # of two threads
    assert run.events[0::3] == ["step 3", "shutdown"]
    assert stopped.value.__notes__ == [f"{STOPPED}its checkpoint at step 7"]


def test_ctrl_c_before_the_first_report_waits_for_nothing(
    run: Run, ray_ends: threading.Event
) -> None:
    run.folder.say("is being set up")
    run.interrupted_by = "distill: is being set up"
    with pytest.raises(KeyboardInterrupt) as stopped:
        _in_thread(ray_ends.wait, run.follow)
    assert run.events == ["distill: is being set up", "shutdown"]
    assert not run.folder.is_to_stop()
    assert stopped.value.__notes__ == [f"{STOPPED}its beginning, with no checkpoint yet"]


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_does_not_wait_for_ever_and_a_second_one_not_at_all(
    run: Run, ray_ends: threading.Event, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    waits: list[float] = []

    class Ended(threading.Event):
        """Of a fit whose workers hang."""

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            if again and SAVING in run.events:
                raise KeyboardInterrupt
            return False

    monkeypatch.setattr(module, "threading", SimpleNamespace(Event=Ended, Thread=threading.Thread))
    run.folder.report(REPORT)
    run.interrupted_by = "step 3"
    with pytest.raises(KeyboardInterrupt) as stopped:
        _in_thread(ray_ends.wait, run.follow)
    assert waits == [0.5, 120]
    assert run.events == ["step 3", SAVING, "shutdown"]
    assert run.folder.is_to_stop()
    assert stopped.value.__notes__ == [f"{STOPPED}its beginning, with no checkpoint yet"]


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


@pytest.mark.usefixtures("no_ray")
def test_that_it_begins_anew_beside_checkpoints_of_another_training_is_said(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(make_job(**given)["folder"])
    other = folder.with_name("distill-other")
    (other / "checkpoint_1").mkdir(parents=True)
    monkeypatch.setattr(module, "_fit", lambda *args: {"refused": "lower it"})

    def said() -> list[str]:
        heard: list[str] = []
        with pytest.raises(TrainingError, match="lower it"):
            train_stage(**given, say=heard.append)
        return heard

    (line,) = said()
    assert line.startswith(f"distill: begins anew; what was interrupted in {other} had another")
    assert (other / "checkpoint_1").is_dir()
    (folder / "checkpoint_1").mkdir()
    assert said() == []  # it does not begin anew


def test_ray_is_told_what_compute_says(
    given: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Trainer:
        def __init__(self, loop: Any, **told: Any) -> None:
            made.append(SimpleNamespace(**told))

        def fit(self) -> Any:
            return SimpleNamespace(return_value={"steps": 3})

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8, "GPU": 3})
    for compute in (
        ComputeConfig(),
        ComputeConfig(workers=2, gpus=False, keep_checkpoints=5, max_failures=4),
    ):
        assert module._fit(make_job(**given), run.folder, compute, run.follow) == {"steps": 3}
    plain, told = made
    assert plain.run_config.checkpoint_config.num_to_keep == 2  # should the newest be damaged
    assert (plain.scaling_config.num_workers, plain.scaling_config.use_gpu) == (3, True)
    assert told.run_config.checkpoint_config.num_to_keep == 5
    assert told.run_config.failure_config.max_failures == 4
    assert (told.scaling_config.num_workers, told.scaling_config.use_gpu) == (2, False)
    for one in made:  # where `RunFolder.checkpoints` looks for them
        where = Path(one.run_config.storage_path) / one.run_config.name
        assert where == run.folder.path
        assert one.train_loop_config == make_job(**given)
