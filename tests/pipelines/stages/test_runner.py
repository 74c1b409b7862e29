from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.config.pipeline import ConfigError
from pipelines.stages.progress import StageView
from pipelines.stages.runner import StageRunner, locked
from pipelines.tracking.records import StageRecord
from pipelines.tracking.tracker import Tracker, client_for


@pytest.fixture
def make_runner(mlflow_uri: str, tmp_path: Path) -> Callable[[], StageRunner]:
    def make() -> StageRunner:
        parent = Tracker.start_pipeline(mlflow_uri, "liveedit", "test", {})
        view = StageView(Console(file=StringIO()), ("one", "two"))
        return StageRunner(tmp_path / "out", parent, view)

    return make


class Work:
    """Writes `text` and counts how often it was asked to."""

    def __init__(self, output: Path, text: str = "made") -> None:
        self.output, self.text, self.calls = output, text, 0

    def __call__(self, tracker: Tracker, key: str) -> dict[str, float]:
        self.calls += 1
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(self.text)
        return {"loss": 0.25}


def run(runner: StageRunner, work: Work, version: int = 1, **inputs: int) -> StageRecord:
    return runner.run("one", version, inputs, work.output, work)


def test_unchanged_stage_is_reused_and_linked(
    make_runner: Callable[[], StageRunner], mlflow_uri: str, tmp_path: Path
) -> None:
    work = Work(tmp_path / "out" / "file")
    first = run(make_runner(), work, steps=3)
    again = make_runner()
    assert run(again, work, steps=3) == first
    assert work.calls == 1
    assert again.view.reused == ["one"]
    parent = client_for(mlflow_uri).get_run(again.parent.run_id)
    assert parent.data.tags["liveedit.reused.one"] == first.run_id
    assert f"/runs/{first.run_id})" in parent.data.tags["mlflow.note.content"]


def test_stage_runs_again_for_other_inputs_code_or_a_changed_output(
    make_runner: Callable[[], StageRunner], tmp_path: Path
) -> None:
    work = Work(tmp_path / "out" / "file")
    run(make_runner(), work, steps=3)
    run(make_runner(), work, steps=4)
    assert work.calls == 2
    run(make_runner(), work, 2, steps=4)
    assert work.calls == 3
    work.output.write_text("somebody wrote here")
    run(make_runner(), work, 2, steps=4)
    assert work.calls == 4
    work.output.unlink()
    run(make_runner(), work, 2, steps=4)
    assert work.calls == 5
    run(make_runner(), work, 2, steps=4)
    assert work.calls == 5


def test_what_a_stage_left_elsewhere_can_be_missed(
    make_runner: Callable[[], StageRunner], tmp_path: Path
) -> None:
    work = Work(tmp_path / "out" / "file")
    run(make_runner(), work)
    make_runner().run("one", 1, {}, work.output, work, still_there=lambda record: False)
    assert work.calls == 2


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("broken"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_stopped_stage_has_no_record_and_its_run_says_so(
    make_runner: Callable[[], StageRunner],
    mlflow_uri: str,
    tmp_path: Path,
    error: BaseException,
    status: str,
) -> None:
    run_ids = []

    def stop(tracker: Tracker, key: str) -> dict[str, float]:
        run_ids.append(tracker.run_id)
        raise error

    runner = make_runner()
    with pytest.raises(type(error)):
        runner.run("one", 1, {}, tmp_path / "out" / "file", stop)
    assert runner.records.read("one") is None
    assert client_for(mlflow_uri).get_run(run_ids[0]).info.status == status
    work = Work(tmp_path / "out" / "file")
    run(make_runner(), work)
    assert work.calls == 1


def test_finished_stage_shows_its_metrics(
    make_runner: Callable[[], StageRunner], mlflow_uri: str, tmp_path: Path
) -> None:
    runner = make_runner()
    record = run(runner, Work(tmp_path / "out" / "file"))
    data = client_for(mlflow_uri).get_run(record.run_id).data
    assert data.metrics["loss"] == 0.25
    assert data.metrics["seconds"] >= 0
    runner.pass_over("two", "two.steps=0")
    shown = runner.view.console.file
    assert isinstance(shown, StringIO)
    assert "loss 0.25" in shown.getvalue()
    assert "passed over" in shown.getvalue()


def test_second_pipeline_in_the_same_output_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(ConfigError, match="in use by another pipeline"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "output"
    with (
        pytest.raises(ConfigError, match=rf"output={output} cannot be written to \(.*=FOLDER"),
        locked(output),
    ):
        pass
