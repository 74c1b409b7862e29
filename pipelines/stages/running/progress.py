"""What a pipeline shows while it works: a line a stage, with a bar in a terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

MARKS = {"done": "[green]done[/]", "reused": "[cyan]reused[/]", "passed": "[dim]passed over[/]"}

QUIET_SECONDS = 15  # outside a terminal, between two lines of a stage


class StageView:
    """A context manager; outside a terminal it prints lines instead of moving bars."""

    def __init__(self, console: Console, stages: tuple[str, ...]) -> None:
        self.console = console
        self.finished: list[str] = []  # done in this run or before
        self.reused: list[str] = []  # done before
        self._live = console.is_terminal
        self._printed = 0.0
        self._started: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=16),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {
            stage: self._progress.add_task(stage, start=False, total=1, note="") for stage in stages
        }

    def start(self, stage: str, note: str = "") -> None:
        self._started[stage] = time.monotonic()
        self._progress.start_task(self._tasks[stage])
        self._progress.update(self._tasks[stage], total=None, note=escape(note))  # a pulsing bar
        if not self._live:
            self._print(f"{stage:<11} started {escape(note)}")

    def update(self, stage: str, done: float, total: float, note: str = "") -> None:
        self._progress.update(self._tasks[stage], completed=done, total=total, note=escape(note))
        if not self._live and time.monotonic() - self._printed > QUIET_SECONDS:
            self._print(f"{stage:<11} {escape(note)}")

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        self.console.print(line.rstrip(), markup=True, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that is no stage's."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def finish(self, stage: str, note: str = "", mark: str = "done") -> None:
        """`mark` is done, reused or passed (a stage without steps)."""
        self.finished.append(stage)
        if mark == "reused":
            self.reused.append(stage)
        task = self._tasks[stage]
        seconds = time.monotonic() - self._started.get(stage, time.monotonic())
        self._progress.start_task(task)
        self._progress.update(task, completed=1, total=1, note=f"{MARKS[mark]} {escape(note)}")
        self._progress.stop_task(task)
        if not self._live:
            took = f"in {seconds:.0f} s" if mark == "done" else ""
            self._print(f"{stage:<11} {MARKS[mark]} {took} {escape(note)}")

    def __enter__(self) -> StageView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
