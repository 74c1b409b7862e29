"""`liveedit data`: datasets of pairs made, ingested and checked."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.runtime.errors import UserError
from modeling.geometry import TOKEN_PIXELS
from pipelines.commands.options import check_clip, parse_size
from pipelines.commands.show import bar, console, examples

QUIET_SECONDS = 15  # outside a terminal, between two lines of progress

data_app = typer.Typer(no_args_is_help=True, help="Make, ingest and check datasets of pairs.")


@data_app.command("make", epilog=examples("liveedit data make data/train --pairs 1000 --workers 8"))
def data_make(
    target: Annotated[str, typer.Argument(help="A new folder, or s3://bucket/prefix.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A folder of photos and clips; without it, drawn scenes."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="How many pairs.", min=1)] = 100,
    size: Annotated[
        str | None,
        typer.Option(help="Width x height; multiples of 16 to train on (192x128)."),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames a clip, 4n-3; 33 is 9 latents.", min=1)] = 33,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 16,
    seed: Annotated[int, typer.Option(help="Another seed gives other pairs.", min=0)] = 0,
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    samples_per_shard: Annotated[int, typer.Option(help="Pairs a tar file.", min=1)] = 16,
    workers: Annotated[int, typer.Option(help="Processes.", min=0)] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset.")] = False,
    bench: Annotated[
        bool,
        typer.Option(
            "--bench",
            help="The sources of LiveEdit-Bench instead, for other systems to edit "
            "(docs/benchmark.md); takes --from and --size (224x128 is the published one).",
        ),
    ] = False,
) -> None:
    """Make editing pairs with exact ground truth, of drawn scenes or of your own footage."""
    if bench:
        make_bench(target, source, size, overwrite)
        return
    from pipelines.stages.data import PairRecipe, make_from_footage, make_synthetic

    height, width = parse_size(size or "192x128", TOKEN_PIXELS)
    check_clip(frames, fps)
    recipe = PairRecipe(
        pairs, height, width, frames, fps, seed, split, samples_per_shard, workers, overwrite
    )
    write = make_synthetic if source is None else partial(make_from_footage, source=source)
    with bar("pairs", pairs) as (progress, task):
        info = write(
            target, recipe=recipe, on_pair=lambda done: progress.update(task, completed=done)
        )
        progress.update(task, completed=pairs)
    console.print(_described(target, info), soft_wrap=True)


def make_bench(target: str, source: Path | None, size: str | None, overwrite: bool) -> None:
    """Write the benchmark's 120 sources into the folder `target`."""
    from data.bench.cases import CASES
    from pipelines.config.benchmark import BenchConfig
    from pipelines.stages.bench_data import write_bench

    if "://" in target:
        raise UserError(f"{target}: the benchmark's videos are written to a folder, not to S3")
    config = BenchConfig(footage=None if source is None else str(source))
    if size is not None:
        config = replace(config, size=size)
    with bar("clips", len(CASES)) as (progress, task):
        made = write_bench(
            Path(target), config, overwrite=overwrite, on_clip=lambda: progress.advance(task)
        )
    console.print(f"{target}: {made}", soft_wrap=True)


@data_app.command(
    "ingest",
    epilog=examples("liveedit data ingest pairs.json data/train --size 832x480 --frames 81"),
)
def data_ingest(
    pairs: Annotated[
        Path,
        typer.Argument(
            help='A list of {"instruction": ..., "source_path": ..., "edited_path": ...}: JSON, or '
            "one a line (JSON Lines)."
        ),
    ],
    target: Annotated[str, typer.Argument(help="A new folder, or s3://bucket/prefix.")],
    size: Annotated[
        str, typer.Option(help="Width x height; multiples of 16 to train on.")
    ] = "832x480",
    frames: Annotated[int, typer.Option(help="Frames a clip, 4n-3; 81 is 21 latents.", min=1)] = 81,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 16,
    samples_per_shard: Annotated[int, typer.Option(help="Pairs a tar file.", min=1)] = 16,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes here; by default all cores of the Ray cluster RAY_ADDRESS names, or of "
            "this machine.",
            min=1,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset.")] = False,
) -> None:
    """Turn real pairs of videos into a dataset.

    Any codec, frame rate and shape; clips are resampled and cropped, never stretched. A file that
    cannot be used is named and left out. A run that was stopped goes on where it was.
    """
    from data.ingest import Ingested
    from data.ingest import ingest as run
    from data.pairs import PairList
    from pipelines.stages.ingest import workforce

    height, width = parse_size(size, TOKEN_PIXELS)
    check_clip(frames, fps)
    entries = PairList(pairs.absolute(), fps=fps, frames=frames, height=height, width=width)
    started, told, last = time.monotonic(), 0, time.monotonic()
    with workforce(workers) as (work, place), bar("pairs", len(entries)) as (progress, task):
        console.print(f"{len(entries)} pairs on {place}", soft_wrap=True)

        def show(at: Ingested) -> None:
            nonlocal told, last
            for entry in at.left_out[told:]:
                console.print(f"left out, {entry}", style="yellow", soft_wrap=True)
            told = len(at.left_out)
            if at.resumed and at.done == at.resumed:
                line = f"goes on after entry {at.resumed - 1}, where it was stopped"
                console.print(line, soft_wrap=True)
            rate = (at.done - at.resumed) / max(1e-9, time.monotonic() - started)
            note = f"{rate:.1f} pairs/s, {told} left out"
            progress.update(task, completed=at.done, note=note)
            if not console.is_terminal and time.monotonic() - last > QUIET_SECONDS:
                last = time.monotonic()
                console.print(f"{at.done} of {len(entries)}, {note}", soft_wrap=True)

        info, left_out = run(
            entries,
            target,
            samples_per_shard=samples_per_shard,
            overwrite=overwrite,
            work=work,
            on_entry=show,
        )
    console.print(_described(target, info) + f"; {len(left_out)} left out", soft_wrap=True)


@data_app.command("check", epilog=examples("liveedit data check s3://bucket/pairs"))
def data_check(
    dataset: Annotated[str, typer.Argument(help="A dataset: a folder or s3://bucket/prefix.")],
) -> None:
    """Read every shard and compare it with its checksum."""
    from data.shards import check_dataset

    info = check_dataset(dataset)
    console.print(_described(dataset, info) + "; every shard is as it was written", soft_wrap=True)


def _described(uri: str, info: Any) -> str:
    return (
        f"{uri}: {info.samples} {info.kind} of {info.frames} frames, {info.width}x{info.height}, "
        f"{info.fps:g} fps, {len(info.shards)} shards"
    )
