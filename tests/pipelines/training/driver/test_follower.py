"""What passes between workers and whoever waits for them: reports, refusals, lines."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipelines.stages.running import progress as progress_module
from pipelines.stages.running.progress import StageView
from pipelines.training.follower import Follower
from pipelines.training.run_folder import RunFolder, TrainingReport

REPORT = TrainingReport(3, 10, {"loss": 0.123456, "grad_norm": 7.0}, 2.5)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.open()
    return made


def test_a_line_says_where_it_is_and_how_long_it_takes() -> None:
    assert REPORT.line() == "step 3/10  loss 0.1235  2.5 s/step  0:18 left"  # 7 steps of 2.5 s
    assert REPORT.seconds_left == 17.5
    last = replace(REPORT, step=10, metrics={"critic_loss": 2.0, "dmd_loss": 1.0, "psnr": 3.0})
    assert last.line() == "step 10/10  psnr 3  dmd_loss 1  critic_loss 2  2.5 s/step  0:00 left"
    assert replace(REPORT, step=0, seconds_per_step=12.0).line().endswith("12 s/step  2:00 left")
    assert replace(REPORT, step=9, seconds_per_step=65.4).line().endswith("65.4 s/step  1:05 left")


def test_reports_come_back_whole_and_once(folder: RunFolder) -> None:
    reports = [replace(REPORT, step=n, pid=n, resumed=n == 1) for n in range(1, 5)]
    assert folder.reports(0) == ([], 0)
    folder.report(reports[0])
    folder.report(reports[1])
    found, offset = folder.reports(0)
    assert found == reports[:2]
    folder.report(reports[2])
    with (folder.path / "progress.jsonl").open("a") as file:
        file.write('{"step": 4, ')  # a line that is being written
    found, offset = folder.reports(offset)
    assert found == [reports[2]]
    assert folder.reports(offset) == ([], offset)


def test_a_new_start_forgets_reports_and_refusals_and_keeps_the_rest(folder: RunFolder) -> None:
    folder.report(REPORT)
    folder.refuse("of no use")
    folder.say("goes on")
    folder.ask_to_stop()
    folder.tell_hang("worker 1 hangs")
    assert folder.hang() == "worker 1 hangs"
    assert folder.is_to_stop()
    assert folder.refusal() == "of no use"
    (folder.path / "checkpoint").mkdir()
    folder.open()
    assert folder.refusal() is None
    assert folder.reports(0) == folder.said(0) == ([], 0)
    assert not folder.is_to_stop()
    assert folder.hang() is None  # or the next loss of a worker would be told as yesterday's hang
    assert (folder.path / "checkpoint").is_dir()
    folder.remove()
    assert not folder.path.exists()


def test_what_is_said_comes_back_whole_and_once(folder: RunFolder) -> None:
    assert folder.said(0) == ([], 0)
    folder.say("größer")
    folder.say("goes on")
    found, offset = folder.said(0)
    assert found == ["größer", "goes on"]
    with (folder.path / "said.txt").open("a") as file:
        file.write("a line that is being wri")
    assert folder.said(offset) == ([], offset)
    folder.say("tten")
    assert folder.said(offset)[0] == ["a line that is being written"]


def test_a_part_is_empty_at_first_and_no_killed_worker_leaves_one(folder: RunFolder) -> None:
    def parts() -> list[Path]:
        return sorted(folder.path.glob(".*"))

    mine, other = folder.new_part(0), folder.new_part(1)
    assert mine.parent == folder.path  # on the disk that must hold it anyway
    assert parts() == [mine, other]
    (mine / "left").touch()  # by a worker that was killed
    assert folder.new_part(0) == mine
    assert not list(mine.iterdir())
    folder.clear_part(1)
    assert parts() == [mine]
    folder.open()
    assert parts() == []


def follower(
    folder: RunFolder,
    on_progress: Callable[[TrainingReport], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Follower:
    return Follower("causal", folder, on_progress, say)


def test_every_report_is_passed_on_once(folder: RunFolder) -> None:
    seen: list[TrainingReport] = []
    follow = follower(folder, on_progress=seen.append)
    follow()
    assert seen == []
    folder.report(REPORT)
    follow()
    follow()
    assert seen == [REPORT]
    folder.report(replace(REPORT, step=4))
    folder.report(replace(REPORT, step=5))
    follow()
    assert [report.step for report in seen] == [3, 4, 5]


def test_what_workers_say_is_passed_on_once_under_the_stages_name(folder: RunFolder) -> None:
    heard: list[str] = []
    follow = follower(
        folder, on_progress=lambda report: heard.append(report.line()), say=heard.append
    )
    folder.report(REPORT)
    folder.say("goes on from its checkpoint at step 2")
    follow()
    follow()
    assert heard == ["causal: goes on from its checkpoint at step 2", REPORT.line()]
    folder.say("a second thing")
    follow()
    assert heard[2:] == ["causal: a second thing"]


def test_without_a_listener_lines_go_to_stderr(folder: RunFolder, capsys: Any) -> None:
    follow = follower(folder)
    folder.report(REPORT)
    folder.say("goes on")
    follow()
    assert capsys.readouterr() == ("", f"causal: goes on\ncausal: {REPORT.line()}\n")


def test_a_training_has_begun_with_its_first_report(folder: RunFolder) -> None:
    follow = follower(folder, on_progress=lambda report: None)
    folder.say("goes on")
    assert not follow.has_begun()
    folder.report(REPORT)
    assert follow.has_begun()
    follow()
    assert follow.has_begun()  # also when all reports were passed on


def test_where_it_goes_on(folder: RunFolder) -> None:
    follow = follower(folder)
    told = "Stage causal was stopped; the same command goes on from"
    assert follow.where_it_goes_on() == f"{told} its beginning, with no checkpoint yet"
    for number, step in ((1, 20), (3, 40), (2, 30)):
        saved = folder.path / f"checkpoint_00000{number}"
        saved.mkdir()
        (saved / "manifest-0.json").write_text(json.dumps({"step": step}))
    (folder.path / "checkpoint_000004").mkdir()  # whose upload was cut off
    (folder.path / "checkpoint_manager_snapshot.json").write_text("{}")  # Ray's list of them
    assert folder.checkpoints()[0].name == "checkpoint_000004"
    assert all(saved.is_dir() for saved in folder.checkpoints())
    assert follow.where_it_goes_on() == f"{told} its checkpoint at step 40"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_outside_a_terminal_stages_are_lines(clock: list[float]) -> None:
    file = io.StringIO()
    console = Console(file=file, width=80)

    def lines() -> list[str]:
        text = [line.rstrip() for line in file.getvalue().splitlines()]
        file.seek(0)
        file.truncate()
        return text

    with StageView(console, ("vae", "causal", "distill")) as view:
        view.start("vae", "20 steps")
        assert lines() == ["vae         started 20 steps"]
        clock[0] += 15
        view.update("vae", 1, 20, "step 1")
        assert lines() == []  # not more often than every 15 s
        clock[0] += 0.1
        view.update("vae", 2, 20, "step 2")
        assert lines() == ["vae         step 2"]
        view.update("vae", 3, 20, "step 3")
        assert lines() == []
        clock[0] += 4.9
        view.finish("vae", "loss 1")
        assert lines() == ["vae         done in 20 s loss 1"]
        view.finish("causal", "as before", mark="reused")
        view.finish("distill", mark="passed")
        assert lines() == ["causal      reused  as before", "distill     passed over"]
        assert view.finished == ["vae", "causal", "distill"]
        assert view.reused == ["causal"]


def test_in_a_terminal_stages_are_bars(clock: list[float]) -> None:
    file = io.StringIO()
    with StageView(Console(file=file, force_terminal=True, width=80), ("vae", "causal")) as view:
        view.start("vae")
        view.update("vae", 5, 20, "step 5 of 20")
        task = view._progress.tasks[0]
        assert (task.completed, task.total) == (5, 20)
        assert not view._progress.tasks[1].started
        view.finish("vae", "loss 1")
        assert (task.completed, task.total) == (1, 1)
        view._progress.refresh()
    assert not view._progress.live.is_started  # the terminal is its own again
    text = file.getvalue()
    assert "started" not in text
    for words in ("vae", "causal", "loss 1"):
        assert words in text
