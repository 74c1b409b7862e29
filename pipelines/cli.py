"""The `liveedit` command. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infra.runtime.environment import variable
from pipelines.commands.bench import bench_app
from pipelines.commands.import_model import import_model
from pipelines.commands.serve import serve
from pipelines.models_command import models_app

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

app = typer.Typer(
    name="liveedit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train a video editor that works chunk by chunk, and edit videos with it.\n\n"
        "New here? Run [bold]liveedit demo[/bold]: it makes data, trains, evaluates and edits a "
        "video, all on this machine."
    ),
)
data_app = typer.Typer(no_args_is_help=True, help="Make, ingest and check datasets of pairs.")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(models_app, name="models")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the configuration's."),
]


@app.command(epilog="Example: liveedit demo    Example: liveedit demo distill.steps=200")
def demo(overrides: Overrides = None) -> None:
    """Do the whole job on synthetic pairs, small enough for a laptop.

    Makes editing pairs, trains all stages, evaluates, registers the model and edits a held-out
    video. Everything lands in runs/demo. A second run reuses what is finished.
    """
    console.print(
        "[bold]LiveEdit demo[/]: about 5 minutes on two cores; a second run reuses what is "
        "finished.\n"
    )
    from pipelines.commands.demo import run_demo

    run_demo(overrides or [], console)


@app.command(
    epilog=(
        "Examples: liveedit train demo --dry-run    "
        "liveedit train wan-1.3b model.start=models/wan data.train=s3://bucket/pairs    "
        "liveedit train my.yaml foundation.steps=2000"
    )
)
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="A YAML file, or demo, wan-1.3b, wan-14b (default demo); then settings over it.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the configuration, then stop.")
    ] = False,
) -> None:
    """Run the pipeline: data, VAE, encoding, three training stages, evaluation, registration.

    Stages whose settings and inputs have not changed since they finished are not run again.
    """
    from pipelines.config.load import load_config, to_yaml

    given = list(arguments or [])
    source = given.pop(0) if given and "=" not in given[0] else "demo"
    config = load_config(source, given)
    if dry_run:
        console.print(to_yaml(config), end="", markup=False, soft_wrap=True)
        return
    from pipelines.commands.demo import run_train

    run_train(config, console)


@app.command(
    epilog=(
        "Examples: liveedit evaluate runs/demo/models/distill runs/demo/data/heldout    "
        "liveedit evaluate models:/liveedit@production s3://bucket/heldout mask_cache=true"
    )
)
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
    from pipelines.commands import show as commands

    commands.evaluate(console, model, dataset, overrides or [], out)


@app.command(
    epilog=(
        'Examples: liveedit edit in.mp4 out.mp4 --prompt "make the red circle blue"    '
        'liveedit edit in.mov out.mp4 --prompt "..." --side-by-side --size source    '
        'liveedit edit in.mp4 out.mp4 --prompt "..." --url ws://localhost:8000'
    )
)
def edit(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The video to edit; any codec.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="The edited video; .mp4, .mov or .mkv.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to change.")],
    model: Annotated[
        str | None,
        typer.Option(help="A model directory or models:/NAME@ALIAS (default: the demo's)."),
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            help="Size the model works at: native (the area it was trained at), source, or HxW. "
            "The result has the source's size in any case."
        ),
    ] = "native",
    seed: Annotated[int, typer.Option(help="Another seed gives another result.")] = 0,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Put source and edit next to each other.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(metavar="ws://HOST:PORT", help="Edit on this server, with its model."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="The server's bearer token.", envvar="LIVEEDIT_TOKEN"),
    ] = None,
) -> None:
    """Edit a video file as a prompt says.

    Memory does not grow with the video's length. Frame rate, length, size and audio are kept.
    """
    from pipelines.commands import show as commands

    commands.edit(
        console,
        source,
        output,
        prompt,
        model=model,
        size=size,
        seed=seed,
        side_by_side=side_by_side,
        url=url,
        token=token,
    )


@app.command(epilog="Example: liveedit send runs/demo")
def send(
    output: Annotated[Path, typer.Argument(help="The output folder of a pipeline.")],
    uri: Annotated[
        str | None, typer.Option(help="MLflow's address (default: the pipeline's tracking.uri).")
    ] = None,
) -> None:
    """Send what a pipeline could not tell MLflow: metrics, files, registered models.

    A run whose process was killed is ended, as KILLED. Everything is kept until MLflow has it.
    """
    from pipelines.commands import show as commands

    commands.send(console, output, uri)


app.command(
    "import", epilog="Example: liveedit import Wan2.1-T2V-1.3B --to models/wan --vae taew2_1.pth"
)(import_model)


app.command(
    epilog=(
        "Examples: liveedit serve    liveedit serve models:/liveedit@production --port 8080    "
        "liveedit serve models/wan --host 0.0.0.0 token_file=tokens max_editors=4"
    )
)(serve)


@data_app.command("make", epilog="Example: liveedit data make data/train --pairs 1000 --workers 8")
def data_make(
    target: Annotated[str, typer.Argument(help="A new folder, or s3://bucket/prefix.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A folder of photos and clips; without it, drawn scenes."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="How many pairs.", min=1)] = 100,
    size: Annotated[str, typer.Option(help="Height x width, multiples of 16.")] = "128x192",
    frames: Annotated[int, typer.Option(help="Frames a clip, 4n-3; 33 is 9 latents.", min=1)] = 33,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 16,
    seed: Annotated[int, typer.Option(help="Another seed gives other pairs.", min=0)] = 0,
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    samples_per_shard: Annotated[int, typer.Option(help="Pairs a tar file.", min=1)] = 16,
    workers: Annotated[int, typer.Option(help="Processes.", min=0)] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset.")] = False,
) -> None:
    """Make editing pairs with exact ground truth, of drawn scenes or of your own footage."""
    from pipelines.commands import show as commands

    height, width = parse_size(size)
    commands.make(
        console,
        target,
        source,
        pairs=pairs,
        height=height,
        width=width,
        frames=frames,
        fps=fps,
        seed=seed,
        split=split,
        samples_per_shard=samples_per_shard,
        workers=workers,
        overwrite=overwrite,
    )


@data_app.command(
    "ingest",
    epilog="Example: liveedit data ingest pairs.json data/train --size 480x832 --frames 81",
)
def data_ingest(
    pairs: Annotated[
        Path,
        typer.Argument(
            help='A JSON list of {"instruction": ..., "source_path": ..., "edited_path": ...}.'
        ),
    ],
    target: Annotated[str, typer.Argument(help="A new folder, or s3://bucket/prefix.")],
    size: Annotated[str, typer.Option(help="Height x width, multiples of 16.")] = "480x832",
    frames: Annotated[int, typer.Option(help="Frames a clip, 4n-3; 81 is 21 latents.", min=1)] = 81,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 16,
    samples_per_shard: Annotated[int, typer.Option(help="Pairs a tar file.", min=1)] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset.")] = False,
) -> None:
    """Turn real pairs of videos into a dataset.

    Any codec, frame rate and shape; clips are resampled and cropped, never stretched. A file that
    cannot be used is named and left out.
    """
    from pipelines.commands import show as commands

    height, width = parse_size(size)
    commands.ingest(
        console,
        pairs,
        target,
        height=height,
        width=width,
        frames=frames,
        fps=fps,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )


@data_app.command("check", epilog="Example: liveedit data check s3://bucket/pairs")
def data_check(
    dataset: Annotated[str, typer.Argument(help="A dataset: a folder or s3://bucket/prefix.")],
) -> None:
    """Read every shard and compare it with its checksum."""
    from pipelines.commands import show as commands

    commands.check(console, dataset)


def parse_size(size: str) -> tuple[int, int]:
    """ "128x192" -> (128, 192); a size that is no multiple of 16 is a ValueError."""
    height, _, width = size.partition("x")
    if not (height.isdigit() and width.isdigit()) or int(height) % 16 or int(width) % 16:
        raise ValueError(f"--size {size} must be height x width in multiples of 16, e.g. 128x192")
    return int(height), int(width)


def main() -> None:
    """Exits with 0, with 1 after an error in one line, or with 130 after Ctrl-C (typer's).

    SIGTERM, by which schedulers end a program, is as Ctrl-C. LIVEEDIT_DEBUG=1 shows the traceback
    of an error.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if variable("LIVEEDIT_DEBUG") == "1":
        app()
        return
    warnings.filterwarnings("ignore", module=r"(torchdata|torch|ray|mlflow)\b")
    try:
        app()
    except (ValueError, OSError) as error:
        errors.print(f"[red]Error:[/] {_one_line(error)}", soft_wrap=True)
        sys.exit(1)


def _one_line(error: Exception) -> str:
    from rich.markup import escape

    notes = getattr(error, "__notes__", [])
    return escape(" ".join(" ".join([str(error), *notes]).split()))


if __name__ == "__main__":
    main()
