"""`liveedit import`: public checkpoints as a model directory.

Registered by `pipelines.cli`, which must start without torch; so that is imported inside.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table

from pipelines.commands.show import console, errors

if TYPE_CHECKING:
    from modeling.importing.parts import PartKind
    from modeling.importing.plan import ImportPlan

_OPTIONS: tuple[tuple[PartKind, str], ...] = (
    ("transformer", "PATH"),
    ("vae", "--vae"),
    ("text", "--text"),
)


class Dtype(StrEnum):
    keep = "keep"
    bf16 = "bf16"
    fp32 = "fp32"


def import_model(
    path: Annotated[Path, typer.Argument(help="A checkpoint file, or a Wan or diffusers folder.")],
    to: Annotated[Path, typer.Option(help="The model directory to write, a new folder.")],
    vae: Annotated[
        Path | None, typer.Option(help="Video VAE: Wan2.1, diffusers or TAEHV; file or folder.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UMT5 text encoder: Wan's, diffusers' or transformers'.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="Take a training checkpoint's moving average.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Number type of the weights written.")] = Dtype.keep,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older model directory.")
    ] = False,
) -> None:
    """Turn a public checkpoint into a model directory.

    Takes Wan2.1 text-to-video (original or diffusers), LiveEdit's and Self-Forcing's .pt, TAEHV
    and UMT5. What a file holds is found out by itself. Every tensor is checked before anything is
    written, and no code in a file is ever run. docs/checkpoints.md lists what can be imported.
    """
    import torch

    from modeling.importing.checkpoint_files import WeightsError
    from modeling.importing.plan import check_target, plan_import, write_import

    types = {Dtype.keep: None, Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}
    try:
        check_target(to, overwrite=overwrite)
        with console.status(f"Reading {path}"):
            plan = plan_import(path, vae=vae, text=text, ema=ema, dtype=types[dtype])
        with _progress() as progress:
            tasks: dict[str, TaskID] = {}

            def on_progress(name: str, done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=total)
                progress.update(tasks[name], completed=done)

            write_import(plan, to, overwrite=overwrite, on_progress=on_progress)
    except WeightsError as error:
        # Lists of tensors have a line each, which the command line's own one-line errors lose.
        errors.print("Error:", style="red", end=" ")
        errors.print(str(error), soft_wrap=True)
        raise typer.Exit(1) from error
    _print_summary(plan, to)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _print_summary(plan: ImportPlan, to: Path) -> None:
    from modeling.importing.parts import NAMES

    table = Table("part", Column("from", overflow="fold"), "layout", "parameters", "type", "size")
    for kind, part in plan.parts.items():
        dtype = plan.dtype or next(iter(part.state.values())).dtype
        table.add_row(
            NAMES[kind],
            part.weights.name.name,
            part.layout,
            f"{part.parameters / 1e6:,.1f} M",
            str(dtype).removeprefix("torch."),
            f"{part.bytes(plan.dtype) / 1e9:.2f} GB",
        )
    console.print(table)
    for kind, part in plan.parts.items():
        for note in part.notes:
            console.print(f"{NAMES[kind]}: {note}", soft_wrap=True)
    missing = [f"{NAMES[kind]} ({option})" for kind, option in _OPTIONS if kind not in plan.parts]
    sizes = f", with the sizes of {plan.preset}" if plan.preset else ""
    console.print(f"Wrote {to}{sizes}.", soft_wrap=True)
    if missing:
        console.print(
            f"It has no {' and no '.join(missing)}: import again with all parts to edit or train.",
            soft_wrap=True,
        )
    elif plan.is_editor:
        console.print(f'Next: liveedit edit IN OUT --prompt "..." --model {to}', soft_wrap=True)
    else:
        name = plan.preset or "CONFIG"
        console.print(f"Next: liveedit train {name} model.start={to}", soft_wrap=True)
