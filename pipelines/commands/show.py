"""What `liveedit edit`, `evaluate` and `data` do and print."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from pipelines.config.load import load_section
from pipelines.config.pipeline import EvaluateConfig
from pipelines.tracking.records import write_json

if TYPE_CHECKING:
    from pipelines.stages.edit import EditReport


def edit(
    console: Console,
    source: Path,
    output: Path,
    prompt: str,
    *,
    model: str | None,
    size: str,
    seed: int,
    side_by_side: bool,
    url: str | None,
    token: str | None,
) -> None:
    """Edit a file with a progress bar, here or on a server."""
    from data.video import probe
    from pipelines.stages.edit import check_edit, edit_video, expected_frames

    if url is not None and model is not None:
        raise ValueError(f"--model {model} does nothing beside --url: a server has its own model")
    check_edit(source, output, prompt)
    info = probe(source)
    run: Callable[..., EditReport]
    if url is not None:
        from pipelines.stages.live import edit_remote

        run, place = partial(edit_remote, url, token=token), url
    else:
        from pipelines.evaluation.evaluate import load_editor
        from pipelines.tracking.registry import locate

        place = str(locate(model))
        run = partial(edit_video, load_editor(place))
    with _bar(console, "frames", expected_frames(info)) as (progress, task):

        def show(done: int) -> None:
            speed = progress.tasks[task].speed or 0.0
            progress.update(task, completed=done, note=f"{speed:.1f} fps")

        report = run(
            source,
            output,
            prompt,
            size=size,
            seed=seed,
            side_by_side=side_by_side,
            progress=show,
        )
    console.print(
        f"{output}: {report.frames} frames in {report.seconds:.1f} s ({report.fps:.1f} fps), "
        f"edited at {report.height}x{report.width}, {report.recomputed:.0%} of tokens computed, "
        f"model {place}",
        soft_wrap=True,
    )


def evaluate(
    console: Console, model: str, dataset: str, overrides: list[str], report_path: Path
) -> None:
    """Judge a model; table on the console, all numbers in `report_path`."""
    config = load_section(EvaluateConfig, overrides)
    from data.manifest import read_dataset_info
    from pipelines.evaluation.evaluate import evaluate as run
    from pipelines.evaluation.evaluate import load_editor, table_rows
    from pipelines.tracking.registry import locate

    samples = read_dataset_info(dataset).samples
    editor = load_editor(locate(model), config.mask_cache)
    with _bar(console, "clips", min(config.clips or samples, samples)) as (progress, task):
        report = run(editor, dataset, config, on_clip=lambda clip: progress.advance(task))
    write_json(report_path, report)
    console.print(metrics_table(table_rows(report["mean"])))
    console.print(f"{len(report['clips'])} clips; every number is in {report_path}", soft_wrap=True)


def make(console: Console, target: str, source: Path | None, *, pairs: int, **recipe: Any) -> None:
    """Write a dataset of drawn scenes, or of the footage in `source`."""
    from pipelines.stages.data import make_synthetic
    from pipelines.stages.footage_data import make_from_footage

    write = make_synthetic if source is None else partial(make_from_footage, source=source)
    with _bar(console, "pairs", pairs) as (progress, task):
        info = write(
            target,
            pairs=pairs,
            on_pair=lambda done: progress.update(task, completed=done),
            **recipe,
        )
        progress.update(task, completed=pairs)
    console.print(_described(target, info), soft_wrap=True)


def ingest(
    console: Console,
    pairs_file: Path,
    target: str,
    *,
    height: int,
    width: int,
    frames: int,
    fps: float,
    samples_per_shard: int,
    overwrite: bool,
) -> None:
    """Write a dataset of real pairs and name what was left out."""
    from data.pairs import PairList
    from data.sample import Pair
    from data.shards import write_dataset

    pairs = PairList(pairs_file, fps=fps, frames=frames, height=height, width=width)
    made_by: dict[str, Any] = {"ingest": pairs_file.name}
    with _bar(console, "pairs", len(pairs)) as (progress, task):

        def counted() -> Iterator[Pair]:
            for pair in pairs:
                yield pair
                progress.advance(task)
            made_by["left_out"] = len(pairs.left_out)  # known with the last; written after it

        info = write_dataset(
            target,
            counted(),
            made_by=made_by,
            samples_per_shard=samples_per_shard,
            overwrite=overwrite,
        )
    for entry in pairs.left_out:
        console.print(f"left out, {entry}", style="yellow", markup=False, soft_wrap=True)
    console.print(_described(target, info) + f"; {len(pairs.left_out)} left out", soft_wrap=True)


def check(console: Console, dataset: str) -> None:
    """Compare every shard with its checksum."""
    from data.shards import check_dataset

    info = check_dataset(dataset)
    console.print(_described(dataset, info) + "; every shard is as it was written", soft_wrap=True)


def send(console: Console, output: Path, uri: str | None) -> None:
    """Send what waits in the outbox of `output`. Raises ValueError if not all of it is taken."""
    from pipelines.config.load import load_config
    from pipelines.stages.runner import locked
    from pipelines.tracking.outbox import Outbox
    from pipelines.tracking.tracker import TrackingError, check_reachable

    if not (output / "tracking").is_dir():
        raise ValueError(f"{output} is no output folder of a pipeline: it has no folder tracking")
    config = load_config(output / "config.yaml", [f"tracking.uri={uri}"] if uri else [])
    place = config.tracking.uri
    assert place is not None
    check_reachable(place)
    said: list[str] = []
    with locked(output), Outbox(output, place, config.tracking.experiment, said.append) as outbox:
        outbox.put_refused_back()
    if said:
        raise TrackingError(said[-1])
    console.print(f"{place} has all of {output}", soft_wrap=True)


def command_name(name: str) -> str:
    """How this environment's command is called from here."""
    ours = Path(sys.executable).with_name(name)
    return name if shutil.which(name) == str(ours) else short(ours)


def short(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def metrics_table(rows: list[tuple[str, str, str]]) -> Table:
    table = Table("metric", "value", "what it says", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _described(uri: str, info: Any) -> str:
    return (
        f"{uri}: {info.samples} {info.kind} of {info.frames} frames, {info.height}x{info.width}, "
        f"{info.fps:g} fps, {len(info.shards)} shards"
    )


@contextmanager
def _bar(console: Console, unit: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
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
