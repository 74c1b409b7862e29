"""What becomes of a fit that is waited for: its end, its errors, and Ctrl-C."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, PreemptionError, WorkerGroupError

from infra.runtime.errors import UserError
from pipelines.exits import TryAgainError
from pipelines.training import trainer as module
from pipelines.training.follower import Follower
from pipelines.training.run_folder import RunFolder, TrainingError, TrainingReport
from pipelines.training.trainer import _in_thread, _plain_error

REPORT = TrainingReport(3, 10, {"loss": 1.0}, 2.5)


@dataclass
class Run:
    """A folder that is followed, and in order what its listeners got and what became of it."""

    folder: RunFolder
    events: list[str] = field(default_factory=list)
    interrupted_by: str | None = None  # the event at which Ctrl-C comes

    @property
    def follow(self) -> Follower:
        return Follower("distill", self.folder, self.got, self.note)

    def got(self, report: TrainingReport) -> None:
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
    both = WorkerGroupError("", {rank: RayActorError("node failed") for rank in (2, 1)})
    assert "lost worker 1 (RayActorError: " in str(_plain_error(both, run.follow))
    assert str(found).endswith("from its beginning, with no checkpoint yet")
    told = RuntimeError("ray")
    told.worker_failures = {1: TryAgainError("worker 1 (told to end)")}  # type: ignore[attr-defined]
    assert str(_plain_error(told, run.follow)).startswith(
        "stage distill lost worker 1 (told to end) more often than compute.max_failures allows. "
    )
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
