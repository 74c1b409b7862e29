"""How commands print: one console, names as a person would type them, tables and bars."""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# Without markup: a file may be called [red].mp4.
console = Console(highlight=False, markup=False)
errors = Console(stderr=True, highlight=False, markup=False)


def command_name(name: str) -> str:
    """How this environment's command is called from here."""
    ours = Path(sys.executable).with_name(name)
    return name if shutil.which(name) == str(ours) else short(ours)


def item(name: str, value: object, width: int) -> Text:
    """A line of a list; `name` is bold, and as wide as the others'."""
    return Text.assemble("  ", (f"{name:<{width}}", "bold"), str(value))


def examples(*lines: str) -> str:
    """A command's epilog, an example a line."""
    return "\n\n".join(("Examples:" if len(lines) > 1 else "Example:", *lines))


def flowing(function: Callable[..., None]) -> str:
    """A command's docstring with each paragraph on one line: the terminal breaks it, not we."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def chosen_model(model: str | None) -> str:
    """The path of the model that is meant; says on a line which and why, unless it was named."""
    from pipelines.tracking.registry import AS_ASKED, choose

    chosen = choose(model)
    if chosen.why != AS_ASKED:
        console.print(f"model: {short(chosen.path)}, {chosen.why}", soft_wrap=True)
    return str(chosen.path)


def short(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def metrics_table(rows: list[tuple[str, str, str]]) -> Table:
    table = Table("metric", "value", "what it says", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def bar(unit: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(unit, total=total, note="")
