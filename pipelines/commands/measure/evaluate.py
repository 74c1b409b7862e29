"""`liveedit evaluate`: a model judged on held-out pairs, or on LiveEdit-Bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra.runtime.errors import UserError
from pipelines.commands.measure.benchmark import BENCH, judge
from pipelines.commands.options import Overrides
from pipelines.commands.show import bar, console, metrics_table


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A model directory, or models:/NAME@ALIAS; with --outputs any system's name."
        ),
    ],
    dataset: Annotated[
        str, typer.Argument(help="A dataset of pairs: a folder or s3://...; or bench.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The report: a JSON file (evaluation.json), for bench a folder (runs/bench/NAME)."
        ),
    ] = None,
    outputs: Annotated[
        Path | None,
        typer.Option(help="bench: judge the videos NAME.mp4 of this folder, of any system."),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="bench: a bench.json of another system, for one table. Repeatable."),
    ] = None,
    track: Annotated[bool, typer.Option(help="bench: log the report to MLflow.")] = True,
) -> None:
    """Judge a model on held-out pairs, streamed chunk by chunk.

    Prints a table and writes all numbers as JSON. Settings: clips, seed, mask_cache, dilate,
    success_db. With bench for a dataset: LiveEdit-Bench, 120 held-out clips of 20 kinds
    (docs/benchmark.md); settings: half, every, long, only, size, footage, seed,
    mask_cache.
    """
    if dataset == BENCH:
        judge(model, overrides or [], out=out, outputs=outputs, beside=beside or [], track=track)
        return
    if outputs is not None or beside:
        raise UserError("--outputs and --beside belong to bench: liveedit evaluate NAME bench ...")
    from data.manifest import read_dataset_info
    from pipelines.config.load import load_section
    from pipelines.config.pipeline import EvaluateConfig
    from pipelines.evaluation.evaluate import evaluate as run
    from pipelines.evaluation.evaluate import load_editor, table_rows
    from pipelines.tracking.records import write_json
    from pipelines.tracking.registry import locate

    config = load_section(EvaluateConfig, overrides or [])

    samples = read_dataset_info(dataset).samples
    editor = load_editor(locate(model), config.mask_cache)
    with bar("clips", min(config.clips or samples, samples)) as (progress, task):
        report = run(editor, dataset, config, on_clip=lambda clip: progress.advance(task))
    out = out or Path("evaluation.json")
    write_json(out, report)
    console.print(metrics_table(table_rows(report["mean"])))
    console.print(f"{len(report['clips'])} clips; every number is in {out}", soft_wrap=True)
