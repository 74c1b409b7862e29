"""`liveedit ablate`: one model in many variants, in one table."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.runtime.errors import UserError
from pipelines.commands.measure.benchmark import BENCH, check_published, print_table
from pipelines.commands.show import bar, console

if TYPE_CHECKING:
    from pipelines.evaluation.judges import Judge


def ablate(
    model: Annotated[
        str,
        typer.Argument(help="A model directory, models:/NAME@ALIAS, or runs/X/models (stages=)."),
    ],
    dataset: Annotated[
        str, typer.Argument(help="A dataset of pairs: a folder or s3://...; or bench.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=A,B,C...", help="What varies, and settings of the evaluation."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of table, plot and every number.")] = Path(
        "runs/ablation"
    ),
    track: Annotated[bool, typer.Option(help="Log a run for each variant to MLflow.")] = True,
) -> None:
    """Measure every combination on the same clips, against the first; what cannot be is left out.

    Varies: cache (none, published, attention, feedforward, block, follow, settled, or a policy of
    yours), keep, pruned (1+2), threshold, dilate, steps, window, sinks, history (own, truth: as if
    its past edits had been right), seed, work_size, detail, stages; whole (steps of a foundation
    model that sees all of a clip) with guidance. Settings as for `evaluate MODEL DATASET`: clips,
    seed, success_db; for bench half, every, long, only, size, footage.
    """
    from pipelines.config.ablation import ALSO_SETTINGS, parse_grid
    from pipelines.evaluation.ablation import ablate as run
    from pipelines.evaluation.ablation import fitting, log_reports, markdown, plot, table
    from pipelines.tracking.records import write_json
    from pipelines.tracking.registry import locate

    if "=" in dataset:
        raise UserError(f"{dataset} is no dataset; name one after the model, or bench")
    words = words or []
    grid = parse_grid(words, ALSO_SETTINGS if dataset == BENCH else ("seed",))
    with_stages = any("stages" in variant for variant in grid.variants)
    place = Path(model) if with_stages else Path(locate(model))
    variants, left_out = fitting(place, grid.variants)  # now, and not hours later
    for line in left_out:
        console.print(line, soft_wrap=True)
    grid = replace(grid, variants=variants)
    judge = _judge(dataset, grid.settings)
    command = shlex.join(["liveedit", "ablate", model, dataset, *words])
    out.mkdir(parents=True, exist_ok=True)
    reports: list[dict[str, Any]] = []

    def write() -> None:
        write_json(out / "ablation.json", {"reports": reports})
        text = f"`{command}`: {reports[0]['made']}\n\n{markdown(reports)}"
        (out / "ablation.md").write_text(text, encoding="utf-8")

    with bar("clips", len(grid.variants) * judge.clips) as (progress, task):

        def show(name: str) -> None:
            progress.update(task, advance=1, note=name)

        def done(report: dict[str, Any]) -> None:
            reports.append(report)
            write()  # what is measured, should the rest not be
            if not console.is_terminal:
                console.print(f"done: {report['variant']}", soft_wrap=True)

        run(place, grid, judge, on_clip=show, on_variant=done)
    plot(reports, out / "ablation.png")
    print_table(*table(reports))
    console.print(f"table, plot and every number are in {out}", soft_wrap=True)
    if track:
        files = [out / name for name in ("ablation.json", "ablation.md", "ablation.png")]
        console.print(log_reports(command, reports, files), soft_wrap=True)


def _judge(dataset: str, settings: tuple[str, ...]) -> Judge:
    from pipelines.config.benchmark import BenchConfig
    from pipelines.config.load import load_section
    from pipelines.config.pipeline import EvaluateConfig
    from pipelines.evaluation.judges import Bench, Pairs

    if dataset != BENCH:
        return Pairs(dataset, load_section(EvaluateConfig, settings))
    config = load_section(BenchConfig, settings)
    check_published(config)
    return Bench(config)
