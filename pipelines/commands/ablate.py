"""`liveedit ablate`: one model in many variants, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.benchmark import print_table
from pipelines.commands.show import bar, console


def ablate(
    model: Annotated[
        str,
        typer.Argument(help="A model directory, models:/NAME@ALIAS, or runs/X/models (stages=)."),
    ],
    words: Annotated[
        list[str],
        typer.Argument(metavar="KEY=A,B,C...", help="What varies, and settings of the benchmark."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of table, plot and every number.")] = Path(
        "runs/ablation"
    ),
    track: Annotated[bool, typer.Option(help="Log a run for each variant to MLflow.")] = True,
) -> None:
    """Measure every combination on the same clips of LiveEdit-Bench, against the first.

    Varies: cache (none, published, attention, block, follow), keep, pruned (1+2), threshold,
    dilate, steps, window, sinks, seed, work_size, detail, stages. Settings as for `evaluate MODEL
    bench`: half, every, long, size, footage.
    """
    from pipelines.config.ablation import parse_grid
    from pipelines.config.benchmark import BenchConfig
    from pipelines.config.load import load_section
    from pipelines.evaluation.ablation import ablate as run
    from pipelines.evaluation.ablation import log_reports, markdown, plot, table
    from pipelines.evaluation.bench.run import chosen
    from pipelines.tracking.records import write_json
    from pipelines.tracking.registry import locate

    grid = parse_grid(words)
    config = load_section(BenchConfig, grid.settings)
    with_stages = any("stages" in variant for variant in grid.variants)
    place = Path(model) if with_stages else Path(locate(model))
    with bar("clips", len(grid.variants) * len(chosen(config))) as (progress, task):

        def show(name: str, judged: Any) -> None:
            progress.update(task, advance=1, note=name)

        def done(report: dict[str, Any]) -> None:
            if not console.is_terminal:
                console.print(f"done: {report['variant']}", soft_wrap=True)

        reports = run(place, grid, config, on_clip=show, on_variant=done)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "ablation.json", {"reports": reports})
    command = f"liveedit ablate {model} {' '.join(words)}"
    text = f"`{command}`: {reports[0]['made']}\n\n{markdown(reports)}"
    (out / "ablation.md").write_text(text, encoding="utf-8")
    plot(reports, out / "ablation.png")
    print_table(*table(reports))
    console.print(f"table, plot and every number are in {out}", soft_wrap=True)
    if track:
        files = [out / name for name in ("ablation.json", "ablation.md", "ablation.png")]
        console.print(log_reports(command, reports, files), markup=False, soft_wrap=True)
