"""`liveedit evaluate MODEL bench`: a model, or another system's videos, on LiveEdit-Bench."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.runtime.errors import UserError
from pipelines.commands.show import bar, console

if TYPE_CHECKING:
    from pipelines.config.benchmark import BenchConfig
    from pipelines.evaluation.bench.kept import Kept
    from pipelines.evaluation.bench.systems import System

BENCH = "bench"  # in the place of a dataset


def judge(
    model: str,
    overrides: list[str],
    *,
    out: Path | None,
    outputs: Path | None,
    beside: list[Path],
    track: bool,
) -> None:
    """Run the benchmark, print its table, write everything into the folder `out`."""
    from pipelines.config.benchmark import BenchConfig
    from pipelines.config.load import load_section
    from pipelines.evaluation.bench.judged import Judged
    from pipelines.evaluation.bench.kept import Kept
    from pipelines.evaluation.bench.pictures import extremes, plot, sheet
    from pipelines.evaluation.bench.printed import SHORT, lines, markdown
    from pipelines.evaluation.bench.printed import beside as compare
    from pipelines.evaluation.bench.run import chosen, run
    from pipelines.tracking.records import write_json

    config = load_section(BenchConfig, overrides)
    others = [read_report(path) for path in beside]
    system = _system(model, outputs, config)
    check_published(config)
    folder = out or Path("runs") / "bench" / re.sub(r"[^\w.-]+", "-", system.name)
    kept = Kept(folder / "clips", system, config)
    _say_what_is_kept(kept, config)
    judged: list[Judged] = []
    with bar("clips", len(chosen(config))) as (progress, task):

        def show(one: Judged) -> None:
            judged.append(one)
            progress.advance(task)

        report = run(system, config, kept=kept, on_clip=show)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("bench.json", "bench.md", "bench.png", "sheet.jpg", "extremes.jpg")
    files = [folder / name for name in names]
    write_json(files[0], report)
    text = f"# LiveEdit-Bench {report['version']}: {report['system']}\n{report['made']}\n\n"
    files[1].write_text(text + markdown(report), encoding="utf-8")
    plot(report, files[2])
    sheet(judged).save(files[3], quality=90)
    extremes(judged).save(files[4], quality=90)
    print_table(*lines(report, SHORT))
    if others:
        table = compare([report, *others])
        (folder / "beside.md").write_text(table, encoding="utf-8")
        console.print(table, soft_wrap=True)
    console.print(report["made"], soft_wrap=True)
    console.print(f"table, plot, sheet and every number are in {folder}", soft_wrap=True)
    if track:
        from pipelines.evaluation.bench.tracked import log_report

        console.print(log_report(report, files), soft_wrap=True)


def _say_what_is_kept(kept: Kept, config: BenchConfig) -> None:
    from pipelines.evaluation.bench.run import chosen

    cases = chosen(config)
    if count := sum(kept.read(case) is not None for case in cases):
        console.print(
            f"{count} of {len(cases)} clips were measured before, by the same code and settings; "
            f"remove {kept.folder} to measure them anew",
            soft_wrap=True,
        )


def check_published(config: BenchConfig) -> None:
    """Refuse, before anything is edited, clips that are not the published ones."""
    from pipelines.evaluation.bench.run import check_clips, chosen, has_checksums

    if not config.published or not has_checksums(config):
        return
    with bar("checksums", len(chosen(config))) as (progress, task):
        check_clips(config, on_clip=lambda: progress.advance(task))


def read_report(path: Path) -> dict[str, Any]:
    """A `bench.json` that was written before; ValueError if it is none, or of other clips."""
    from data.bench.cases import VERSION

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--beside {path} cannot be read ({error}); give a bench.json") from error
    if not isinstance(report, dict) or report.get("benchmark") != "LiveEdit-Bench":
        raise UserError(f"--beside {path} is no report of LiveEdit-Bench; give a bench.json")
    if report["version"] != VERSION:
        raise UserError(f"--beside {path} is of version {report['version']}, this is {VERSION}")
    return report


def _system(model: str, outputs: Path | None, config: BenchConfig) -> System:
    from pipelines.evaluation.bench.run import chosen
    from pipelines.evaluation.bench.systems import OurModel, Videos

    if outputs is not None:
        videos = Videos(model, outputs)
        videos.check(chosen(config), config.shape)
        return videos
    from pipelines.evaluation.evaluate import load_editor
    from pipelines.tracking.registry import locate

    editor = load_editor(locate(model), config.mask_cache)
    return OurModel(editor, config.seed, config.work_size, config.detail)


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """In lines that are not broken, if need be wider than the terminal."""
    widths = [max(len(row[n]) for row in [heads, *rows]) for n in range(len(heads))]
    for row in [heads, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print("  ".join(cells).rstrip(), soft_wrap=True)
