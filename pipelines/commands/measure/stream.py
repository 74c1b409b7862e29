"""`liveedit bench`: the command line of the benchmarks. PyTorch is imported when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from infra.runtime.errors import UserError
from modeling.config import Scope
from pipelines.commands.measure.detail import bench_detail
from pipelines.commands.measure.reports import (
    Check,
    JsonFile,
    Size,
    check_folders,
    judge,
    write_report,
)
from pipelines.commands.measure.serve import bench_serve
from pipelines.commands.measure.train import bench_train
from pipelines.commands.options import parse_numbers, parse_size
from pipelines.commands.show import console, errors, examples

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")


@bench_app.callback()
def bench() -> None:
    """Measure speed on this machine."""


@bench_app.command(
    "stream",
    epilog=examples(
        "liveedit bench stream",
        "liveedit bench stream wan-1.3b --policy budget --scope block --plot now.png",
        "liveedit bench stream demo --device cpu --chunks 6",
    ),
)
def bench_stream(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|PRESET]",
            help="A model directory, or a preset with random weights: demo, wan-1.3b, wan-14b. ",
            show_default="wan-1.3b on a GPU, demo on a CPU",
        ),
    ] = None,
    size: Size = None,
    work_size: Annotated[
        str,
        typer.Option(help="Size the model works at: full, 3/4, 1/2, native or WIDTHxHEIGHT."),
    ] = "full",
    detail: Annotated[
        Literal["source", "off"] | None,
        typer.Option(
            help="Whether edits get the source's detail.",
            show_default="source where --work-size is not full",
        ),
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(
            metavar="decoded|PIXELS",
            help="The guide of detail: the source decoded again, or blurred by so many pixels.",
            show_default="the model's",
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="Another kind of VAE, with random weights.", show_default="the model's"),
    ] = None,
    chunks: Annotated[
        int | None,
        typer.Option(help="Timed chunks of each variant.", show_default="40 on a GPU, 8 on a CPU"),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of tokens recomputed in pruned steps.", show_default="the model's"
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="How the mask cache chooses tokens: budget, follow, published or settled.",
            show_default="the model's",
        ),
    ] = None,
    scope: Annotated[
        Scope | None,
        typer.Option(help="What a pruned token skips.", show_default="the model's"),
    ] = None,
    pruned_steps: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Steps that are pruned.", show_default="the model's"),
    ] = None,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Most linear layers in 8 bits; needs a GPU that can.")
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Time dense streams only.")] = False,
    sessions: Annotated[
        int, typer.Option(help="Most concurrent sessions to try; 0 leaves them out.")
    ] = 8,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="Where to run.")] = "auto",
    json_file: JsonFile = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw them there (.png).")
    ] = None,
    check: Check = None,
) -> None:
    """Time a stream: D (transformer), E (with VAE decode), V (video in to video out).

    Runs what serving runs. Also reports start-up, latency, memory and how many
    live sessions fit. --check compares ratios inside a run, so that machines
    may differ.
    """
    import torch

    from pipelines.bench.check import read_report
    from pipelines.bench.plot import plot
    from pipelines.bench.report import facts, table
    from pipelines.bench.stream import measure
    from pipelines.bench.subject import BenchOptions

    check_folders(json_file, plot_file)
    if plot_file is not None and plot_file.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UserError(f"--plot {plot_file} must end in .png, .jpg or .webp")
    stored = read_report(check) if check else None
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    options = BenchOptions(
        model=model or ("wan-1.3b" if cuda else "demo"),
        device="cuda" if cuda else "cpu",
        chunks=chunks if chunks is not None else 40 if cuda else 8,
        sessions=sessions,
        size=parse_size(size) if size else None,
        work_size=work_size,
        detail=detail or ("off" if work_size == "full" else "source"),
        guide_blur=parse_guide(guide) if guide else None,
        vae=vae,
        no_cache=no_cache,
        policy=policy,
        keep_ratio=keep,
        scope=scope,
        pruned_steps=parse_numbers("--pruned-steps", pruned_steps, 0) if pruned_steps else None,
        fp8=fp8,
    )
    with errors.status("starting") as status:
        report = measure(options, stored, status.update)
    console.print(table(report))
    console.print(*facts(report), sep="\n", soft_wrap=True)
    write_report(report, json_file)
    if plot_file:
        plot(report, plot_file)
    judge(report, stored, check)


bench_app.command(
    "serve",
    epilog=examples(
        "liveedit bench serve --sessions 1,2,4",
        "liveedit bench serve models/wan editor_gpus=1 --json now.json",
        "liveedit bench serve --mode lossless --sessions 2 --kills 20",
    ),
)(bench_serve)

bench_app.command(
    "train",
    epilog=(
        "Examples: liveedit bench train    "
        "liveedit bench train wan-1.3b --stages distill --gpus 2,4 --zero 2,3 --json now.json    "
        "liveedit bench train demo --gpus 2 foundation.batch_size=4"
    ),
)(bench_train)


bench_app.command("detail")(bench_detail)


def parse_guide(guide: str) -> float | Literal["decoded"]:
    """ "decoded", or pixels as in "0.5"."""
    if guide == "decoded":
        return "decoded"
    try:
        return float(guide)
    except ValueError as error:
        raise UserError(f"--guide {guide} must be decoded, or pixels such as 0.5") from error
