"""What the commands of `liveedit bench` share: a report's options, its file, its ratios."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.runtime.errors import UserError
from pipelines.commands.show import console

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all figures there.")]
Check = Annotated[
    Path | None,
    typer.Option(help="An earlier --json file: fail if a ratio got worse than it allows."),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="WIDTHxHEIGHT", help="Pixels.", show_default="the model's"),
]


def check_folders(*files: Path | None) -> None:
    """Raises UserError before anything is measured that could not be written."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"folder {file.parent} does not exist; make it first")


def write_report(report: dict[str, Any], file: Path | None) -> None:
    """Adds the command line to `report`; None writes it nowhere."""
    report["command"] = shlex.join(["liveedit", *sys.argv[1:]])
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n")


def judge(report: dict[str, Any], stored: dict[str, Any] | None, file: Path | None) -> None:
    """Prints each ratio beside the one in `stored`, which `file` holds; ends with 1 if one is
    worse than that allows."""
    from pipelines.bench.check import compare

    if stored is None:
        return
    comparisons = compare(report, stored)
    for comparison in comparisons:
        worse = comparison.regressed
        line = f"{'worse' if worse else '   ok'}  {comparison}"
        console.print(line, style="red" if worse else "", soft_wrap=True)
    if regressed := [c.name for c in comparisons if c.regressed]:
        console.print(f"Regressed against {file}: {'; '.join(regressed)}", soft_wrap=True)
        raise typer.Exit(1)
