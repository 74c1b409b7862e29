"""`liveedit bench serve`: simulated cameras over real sockets against the whole application."""

from __future__ import annotations

import asyncio
import itertools
import json
import shlex
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from serve.client.cameras import Load
    from serve.run import Running

TAIL_S = 5.0  # that cameras go on after the last kill


def bench_serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [KEY=VALUE]...",
            help="As for liveedit serve: what is started and measured.",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="ws://HOST:PORT", help="Measure this running server instead."),
    ] = None,
    token: Annotated[str | None, typer.Option(help="The server's bearer token.")] = None,
    sessions: Annotated[
        str, typer.Option(metavar="N,N", help="Cameras at once, one run after another.")
    ] = "1,2,4",
    seconds: Annotated[float, typer.Option(help="Of video in each run.", min=1)] = 20.0,
    kills: Annotated[
        int,
        typer.Option(help="One more run of most sessions: so many replicas are killed.", min=0),
    ] = 0,
    kill_every: Annotated[
        float, typer.Option(help="Seconds between kills; a front and an editor in turn.", min=1)
    ] = 10.0,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Pixels.", show_default="the model's"),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second.", show_default="the model's")
    ] = None,
    mode: Annotated[
        Literal["live", "lossless"],
        typer.Option(help="What a server that is behind does: drop frames, or make cameras wait."),
    ] = "live",
    format: Annotated[
        Literal["jpeg", "png", "webp", "rgb24"], typer.Option(help="How frames are encoded.")
    ] = "jpeg",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures there.")
    ] = None,
) -> None:
    """Measure live sessions: latency, jitter, deadlines, and what is not the model.

    Starts the application as liveedit serve does (with --kills two editors and two fronts), or
    measures a running one. A chunk's latency runs from when its last source frame was sent until
    its first edited frame came; overhead is what of it is not the model's compute.
    """
    import torch

    from pipelines.bench.machine import hardware
    from pipelines.commands.bench import parse_size
    from pipelines.commands.serve import application, serve_settings
    from serve.client import served_model
    from serve.client.cameras import Load, measure

    counts = parse_counts(sessions)
    if url is not None and kills:
        raise ValueError("--kills kills replicas of an application started here; leave --url out")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"folder {json_file.parent} does not exist; make it first")
    console = Console(highlight=False)
    runs: list[dict[str, object]] = []
    with ExitStack() as stack, Console(stderr=True).status("starting") as status:
        running: Running | None = None
        if url is None:
            several = {"min_editors": 2, "max_editors": 2, "fronts": 2} if kills else {}
            settings = serve_settings(arguments or [], several)
            running = stack.enter_context(application(settings))
            url, token = running.stream_url, next(iter(settings.tokens()), None)
        elif arguments:
            raise ValueError(f"--url measures what runs there; leave {arguments[0]} out")
        model = served_model(url, token=token)
        height, width = parse_size(size) if size else (model["height"], model["width"])
        load = Load(width, height, fps or model["fps"], mode, format, seconds, token)
        for count in counts:
            status.update(f"{count} sessions, {seconds:g} s")
            runs.append(measure(url, load, count).to_dict())
        if running is not None and kills:
            load = replace(load, seconds=max(seconds, kills * kill_every + TAIL_S))
            status.update(f"{max(counts)} sessions, {kills} kills, {load.seconds:g} s")
            kill = killer(running, kills)
            runs.append(
                measure(url, load, max(counts), kill=kill, kill_every_s=kill_every).to_dict()
            )
    report = {
        "command": shlex.join(["liveedit", *sys.argv[1:]]),
        "hardware": hardware(torch.device(str(model["device"]))),
        "model": {name: model[name] for name in model if name != "card"},
        "runs": runs,
    }
    console.print(facts(report, load))
    console.print(table(runs))
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def killer(running: Running, kills: int) -> Callable[[], Awaitable[bool]]:
    """Kills a front and an editor in turn, `kills` replicas in all; says whether one died."""
    kinds = itertools.cycle(("editor", "front"))
    left = kills

    async def kill() -> bool:
        nonlocal left
        if left == 0 or await asyncio.to_thread(running.kill, next(kinds)) is None:
            return False
        left -= 1
        return True

    return kill


def facts(report: dict[str, Any], load: Load) -> str:
    """What was measured, in a line."""
    model = report["model"]
    machine = report["hardware"]
    return (
        f"{model['name']} on {model['device']}, {load.width}x{load.height} at {load.fps:g} fps, "
        f"{load.mode}, {load.format}; {machine.get('gpu') or machine['cpu']}"
    )


def table(runs: list[dict[str, Any]]) -> Table:
    """One column a run, times in milliseconds."""
    view = Table(title="cameras over WebSocket, times in ms", title_justify="left")
    view.add_column("")
    for run in runs:
        killed = f", {run['kills']} kills" if run["kills"] else ""
        sessions = f"{run['sessions']} session{'s' * (run['sessions'] > 1)}"
        view.add_column(sessions + killed, justify="right")
    for label, names in _ROWS.items():
        view.add_row(label, *(" / ".join(_cell(run[name]) for name in names) for run in runs))
    return view


_ROWS: dict[str, tuple[str, ...]] = {
    "sessions held": ("sessions_held",),
    "first chunk P50 / max": ("first_chunk_ms_p50", "first_chunk_ms_max"),
    "chunk latency P50 / P95 / P99": tuple(f"chunk_latency_ms_p{p}" for p in (50, 95, 99)),
    "of it compute P50": ("compute_ms_p50",),
    "overhead P50 / P95 / P99": tuple(f"overhead_ms_p{p}" for p in (50, 95, 99)),
    "jitter between frames": ("jitter_ms",),
    "deadline misses of chunks": ("deadline_misses", "chunks"),
    "stalls": ("stalls",),
    "frames sent / edited / dropped": ("frames_sent", "frames_edited", "frames_dropped"),
    "frames lost / repeated": ("frames_lost", "frames_repeated"),
    "reconnects": ("reconnects",),
    "errors": ("errors",),
}


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def parse_counts(text: str) -> list[int]:
    """Numbers of sessions with commas between them, as in "1,2,4"."""
    if not all(part.strip().isdigit() and int(part) for part in text.split(",")):
        raise ValueError(f"--sessions {text} must be numbers of cameras, e.g. 1,2,4")
    return [int(part) for part in text.split(",")]
