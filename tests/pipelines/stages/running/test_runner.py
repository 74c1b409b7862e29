from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from infra.runtime.registry import client_for
from pipelines.config.merge import ConfigError
from pipelines.stages.running.choice import Choice
from pipelines.stages.running.gate import GateMissedError
from pipelines.stages.running.progress import StageView
from pipelines.stages.running.runner import Enough, StageRunner, locked
from pipelines.tracking.outbox import Outbox, Run
from pipelines.tracking.records import StageRecord, fingerprint_of
from tests.pipelines.tracking.stand_in import Server


@pytest.fixture
def make_runner(outbox: Outbox, tmp_path: Path) -> Callable[[], StageRunner]:
    def make() -> StageRunner:
        parent = outbox.start_pipeline("test", {})
        view = StageView(Console(file=StringIO()), ("one", "two"))
        return StageRunner(tmp_path / "out", parent, view)

    return make


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLflow is told, a stand-in takes at once."""
    monkeypatch.setattr("pipelines.tracking.outbox.Sender", Server)


class Work:
    """Writes `text` and counts how often it was asked to."""

    def __init__(self, output: Path, text: str = "made") -> None:
        self.output, self.text, self.calls = output, text, 0

    def __call__(self, run: Run, key: str) -> dict[str, float]:
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
    assert again.parent.outbox.flush()
    parent = client_for(mlflow_uri).get_run(again.parent.run_id)
    assert parent.data.tags["liveedit.reused.one"] == first.run_id
    assert f"/runs/{first.run_id}?" in parent.data.tags["mlflow.note.content"]


def test_stage_runs_again_for_other_inputs_code_or_a_changed_output(
    offline: None, make_runner: Callable[[], StageRunner], tmp_path: Path
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
    offline: None, make_runner: Callable[[], StageRunner], tmp_path: Path
) -> None:
    work = Work(tmp_path / "out" / "file")
    run(make_runner(), work)
    make_runner().run("one", 1, {}, work.output, work, still_there=lambda record: False)
    assert work.calls == 2


def test_a_stage_is_known_by_its_name_its_code_and_all_of_its_inputs(
    offline: None, make_runner: Callable[[], StageRunner], tmp_path: Path
) -> None:
    def key(stage: str, version: int, **inputs: object) -> str:
        work = Work(tmp_path / "out" / "file")
        return make_runner().run(stage, version, inputs, work.output, work).key

    keys = [
        key("one", 1),
        key("two", 1),
        key("one", 2),
        key("one", 1, seed=0),
        key("one", 1, seed=1),
        key("one", 1, steps=0),
        key("one", 1, config={"steps": 1}),
        key("one", 1, config={"steps": 2}),
        key("one", 1, aliases=["a", "b"]),
        key("one", 1, aliases=["b", "a"]),
        key("one", 1, dataset=None),
    ]
    assert len(set(keys)) == len(keys)
    assert key("one", 1, a=1, b=2) == key("one", 1, b=2, a=1)


def test_work_is_told_the_key_of_its_record_and_its_run(
    make_runner: Callable[[], StageRunner], mlflow_uri: str, tmp_path: Path
) -> None:
    told = []
    work = Work(tmp_path / "out" / "file")

    def listen(run: Run, key: str) -> dict[str, float]:
        told.append((run.run_id, key))
        run.log_metrics({"loss": 2.0}, step=7)
        return work(run, key) | {"gain": 3.0}

    runner = make_runner()
    record = runner.run("one", 1, {"steps": 3, "config": {"rate": 0.5}}, work.output, listen)
    assert told == [(record.run_id, record.key)]
    assert record.output == str(work.output)
    assert record.fingerprint == fingerprint_of(work.output)
    assert record.metrics == {"loss": 0.25, "gain": 3.0}
    assert record.inputs == {"steps": 3, "config": {"rate": 0.5}}
    assert 0 < record.seconds < 600
    assert abs(datetime.now(UTC) - datetime.fromisoformat(record.finished)).total_seconds() < 600
    assert runner.records.read("one") == record
    assert runner.parent.outbox.flush()
    run = client_for(mlflow_uri).get_run(record.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"steps": "3", "config.rate": "0.5"}
    assert run.data.tags["mlflow.parentRunId"] == runner.parent.run_id
    # What the stage logged itself, step by step, stands, and is not told again at the end.
    history = client_for(mlflow_uri).get_metric_history(record.run_id, "loss")
    assert [(entry.step, entry.value) for entry in history] == [(7, 2.0)]
    assert run.data.metrics["gain"] == 3.0


def test_every_reused_stage_is_linked(
    make_runner: Callable[[], StageRunner], mlflow_uri: str, tmp_path: Path
) -> None:
    def both(runner: StageRunner) -> list[StageRecord]:
        works = {name: Work(tmp_path / "out" / name) for name in ("one", "two")}
        return [runner.run(name, 1, {}, w.output, w) for name, w in works.items()]

    before = make_runner()
    first = both(before)
    assert before.parent.outbox.flush()  # two that send at once would make each run twice
    again = make_runner()
    assert both(again) == first
    assert again.parent.outbox.flush()
    tags = client_for(mlflow_uri).get_run(again.parent.run_id).data.tags
    assert tags["mlflow.note.content"].count("Stages reused") == 1
    for record in first:
        assert tags[f"liveedit.reused.{record.stage}"] == record.run_id
        assert f"{record.stage}: " in tags["mlflow.note.content"]
        assert f"/runs/{record.run_id}?" in tags["mlflow.note.content"]


def test_the_record_before_is_what_still_there_looks_at(
    offline: None, make_runner: Callable[[], StageRunner], tmp_path: Path
) -> None:
    work = Work(tmp_path / "out" / "file")
    first = run(make_runner(), work)
    seen: list[StageRecord] = []

    def look(record: StageRecord) -> bool:
        seen.append(record)
        return True

    make_runner().run("one", 1, {}, work.output, work, still_there=look)
    assert (seen, work.calls) == ([first], 1)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("broken"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_stopped_stage_has_no_record_and_goes_on_in_its_own_run(
    make_runner: Callable[[], StageRunner],
    outbox: Outbox,
    mlflow_uri: str,
    tmp_path: Path,
    error: BaseException,
    status: str,
) -> None:
    runs = []

    def stop(run: Run, key: str) -> dict[str, float]:
        runs.append(run)
        run.log_metrics({"loss": 3.0}, step=1)
        raise error

    runner = make_runner()
    with pytest.raises(type(error)):
        runner.run("one", 1, {"steps": 3}, tmp_path / "out" / "file", stop)
    assert runner.records.read("one") is None
    assert outbox.flush()
    client = client_for(mlflow_uri)
    assert client.get_run(runs[0].run_id).info.status == status

    work, again = Work(tmp_path / "out" / "file"), make_runner()
    other = run(make_runner(), Work(tmp_path / "out" / "file"), steps=4)
    assert other.run_id != runs[0].run_id
    with pytest.raises(type(error)):
        make_runner().run("one", 1, {"steps": 3}, tmp_path / "out" / "file", stop)
    record = run(again, work, steps=3)
    assert work.calls == 1
    assert record.run_id == runs[1].run_id
    assert outbox.flush()
    whole = client.get_run(record.run_id)
    assert whole.info.status == "FINISHED"
    assert whole.data.tags["mlflow.parentRunId"] == again.parent.run_id
    history = client.get_metric_history(record.run_id, "loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 3.0), (0, 0.25)]


@pytest.mark.parametrize(("same", "goes_on"), [("what must stay", True), ("other", False)])
def test_interrupted_work_goes_on_in_its_run_while_what_must_stay_stays(
    same: str,
    goes_on: bool,
    offline: None,
    make_runner: Callable[[], StageRunner],
    tmp_path: Path,
) -> None:
    marks: list[str] = []

    def stop(run: Run, key: str) -> dict[str, float]:
        marks.append(run.mark)
        raise KeyboardInterrupt

    output = tmp_path / "out" / "file"
    for steps, asked in ((3, "what must stay"), (4, same)):
        with pytest.raises(KeyboardInterrupt):
            make_runner().run("one", 1, {"steps": steps}, output, stop, same=asked)
    assert (marks[0] == marks[1]) is goes_on


@pytest.mark.parametrize(
    ("asked", "changed", "taken"),
    [
        ({"first": "two"}, False, True),
        ({"first": "two"}, True, False),
        ({"only": "two"}, False, False),
    ],
)
def test_what_a_stage_before_left_for_other_settings(
    asked: dict[str, str],
    changed: bool,
    taken: bool,
    offline: None,
    make_runner: Callable[[], StageRunner],
    tmp_path: Path,
) -> None:
    """A person who says --from may mean it; a scheduler that says --only does not."""
    work = Work(tmp_path / "out" / "file")
    run(make_runner(), work, steps=3)
    if changed:
        work.output.write_text("somebody wrote here")
    runner = make_runner()
    runner.choice = Choice(("one", "two"), **asked)
    if taken:
        run(runner, work, steps=4)
        shown = runner.view.console.file.getvalue()  # type: ignore[attr-defined]
        assert "one: taken as it is, although it would run now: steps 3 -> 4" in shown
        assert runner.view.reused == ["one"]
    else:
        ((name, stage),) = asked.items()
        option = {"first": "--from", "only": "--only"}[name]
        told = rf"^{option} {stage} needs stage one, .* run `--only one` before, or leave {option}"
        with pytest.raises(ConfigError, match=told):
            run(runner, work, steps=4)
    assert work.calls == 1


def test_a_stage_that_misses_its_gate_or_was_the_one_chosen_is_the_last(
    offline: None, make_runner: Callable[[], StageRunner], tmp_path: Path
) -> None:
    """When it was run, and when it is found to be finished."""
    for end, gate in ((Enough, 0.25), (GateMissedError, 0.2)):
        work = Work(tmp_path / "out" / end.__name__)
        for _ in range(2):
            runner = make_runner()
            runner.choice = Choice(("one", "two"), only="one")
            inputs = {"end": end.__name__}
            with pytest.raises(end):
                runner.run("one", 1, inputs, work.output, work, gate={"max_loss": gate})
        assert work.calls == 1


def test_the_record_is_there_before_mlflow_is_waited_for(
    make_runner: Callable[[], StageRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner()
    found = []

    def waits(outbox: Outbox, mark: str) -> str:
        found.append(runner.records.read("one"))
        return mark

    monkeypatch.setattr(Outbox, "run_id", waits)
    run(runner, Work(tmp_path / "out" / "file"))
    assert [record and record.stage for record in found] == ["one"]


def test_finished_stage_shows_its_metrics(
    make_runner: Callable[[], StageRunner], mlflow_uri: str, tmp_path: Path
) -> None:
    runner = make_runner()
    record = run(runner, Work(tmp_path / "out" / "file"))
    assert runner.parent.outbox.flush()
    data = client_for(mlflow_uri).get_run(record.run_id).data
    assert data.metrics["loss"] == 0.25
    assert data.metrics["seconds"] >= 0
    runner.pass_over("two", "two.steps=0")
    shown = runner.view.console.file
    assert isinstance(shown, StringIO)
    assert "loss 0.25" in shown.getvalue()
    assert "passed over" in shown.getvalue()


def test_a_pipeline_ends_after_the_stage_that_was_chosen_though_it_is_passed_over(
    make_runner: Callable[[], StageRunner],
) -> None:
    runner = make_runner()
    runner.choice = Choice(("one", "two"), only="two")
    runner.pass_over("one", "one.steps=0")
    with pytest.raises(Enough):
        runner.pass_over("two", "two.steps=0")
    runner.choice = Choice(("one", "two"), first="one")
    runner.pass_over("one", "one.steps=0")


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
