"""The lines of a pipeline outside a terminal, where nothing moves."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from pipelines.stages.running import progress
from pipelines.stages.running.progress import StageView


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made.monotonic)
    return made


@pytest.fixture
def page() -> StringIO:
    return StringIO()


@pytest.fixture
def view(page: StringIO) -> StageView:
    return StageView(Console(file=page, width=60), ("vae", "causal"))


def test_a_stage_says_when_it_begins_and_how_long_it_took(
    view: StageView, page: StringIO, clock: Clock
) -> None:
    with view:
        view.start("vae", "[here]")
        clock.now += 61.4
        view.finish("vae", "loss 0.25")
    assert page.getvalue().splitlines() == [
        "vae         started [here]",
        "vae         done in 61 s loss 0.25",
    ]


@pytest.mark.parametrize(
    ("mark", "line", "reused"),
    [
        ("done", "causal      done in 0 s why", []),
        ("reused", "causal      reused  why", ["causal"]),
        ("passed", "causal      passed over  why", []),
    ],
)
def test_what_came_of_a_stage(
    mark: str, line: str, reused: list[str], view: StageView, page: StringIO, clock: Clock
) -> None:
    view.finish("causal", "why", mark)
    assert page.getvalue() == f"{line}\n"
    assert (view.finished, view.reused) == (["causal"], reused)


def test_lines_of_a_long_stage_are_some_seconds_apart(
    view: StageView, page: StringIO, clock: Clock
) -> None:
    view.start("vae")
    for seconds in (15, 0.25, 0.25, 14.5, 0.25, 0.25):
        clock.now += seconds
        view.update("vae", 1, 9, f"[at] {clock.now:g} " + "x" * 50)
    told = [line.split()[2] for line in page.getvalue().splitlines()[1:]]
    assert told == ["1015.25", "1030.5"]
    assert "[at]" in page.getvalue(), "no markup"


def test_bars_move_in_a_terminal_and_lines_are_left_to_them(page: StringIO, clock: Clock) -> None:
    view = StageView(Console(file=page, width=80, force_terminal=True), ("vae", "causal"))
    assert view._live
    view.console.print(view._progress)
    assert "causal" in page.getvalue()  # also of what has not begun
    view.start("vae")
    view.update("vae", 3, 9, "here")
    task, _ = view._progress.tasks
    assert (task.completed, task.total, task.fields["note"]) == (3, 9, "here")
    view.finish("vae", "loss 1")
    assert (task.completed, task.total, task.finished) == (1, 1, True)
    assert task.start_time is not None
    assert task.stop_time is not None
    assert task.fields["note"] == "[green]done[/] loss 1"
    assert "started" not in page.getvalue()


def test_what_is_no_stage_s_is_said_as_it_is(view: StageView, page: StringIO) -> None:
    view.warn("[red] " + "x" * 80)
    assert page.getvalue() == "[red] " + "x" * 80 + "\n"
