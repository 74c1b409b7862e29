"""`liveedit evaluate`: a model judged on held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import Overrides
from pipelines.commands.show import bar, console, metrics_table


def evaluate(
    model: Annotated[str, typer.Argument(help="A model directory, or models:/NAME@ALIAS.")],
    dataset: Annotated[str, typer.Argument(help="A dataset of pairs: a folder or s3://...")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where the report is written, as JSON.")] = Path(
        "evaluation.json"
    ),
) -> None:
    """Judge a model on held-out pairs, streamed chunk by chunk.

    Prints a table and writes all numbers as JSON. Settings: clips, seed, mask_cache, dilate,
    success_db.
    """
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
    write_json(out, report)
    console.print(metrics_table(table_rows(report["mean"])))
    console.print(f"{len(report['clips'])} clips; every number is in {out}", soft_wrap=True)
