"""`liveedit bench serve`: simulated cameras over real sockets against the whole application."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from infra.runtime.errors import UserError
from pipelines.commands.measure.reports import JsonFile, Size, check_folders, write_report
from pipelines.commands.options import parse_numbers, parse_size
from pipelines.commands.show import console, errors

if TYPE_CHECKING:
    from pipelines.bench.simulation.day import Day, Rules
    from serve.run import Running


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
    chaos: Annotated[
        bool,
        typer.Option("--chaos", help="Kills are drawn from fronts, editors and the hub."),
    ] = False,
    soak: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="One more run of most sessions, again and again for 90s, 30m or 2h: is every "
            "process's memory flat within 2 %?",
        ),
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="One more run of most sessions beside each; all for all of them.",
        ),
    ] = None,
    size: Size = None,
    work_size: Annotated[
        str | None,
        typer.Option(
            help="Size the model edits at: full, 3/4, 1/2, native or WIDTHxHEIGHT.",
            show_default="the server's",
        ),
    ] = None,
    detail: Annotated[
        Literal["source", "off"] | None,
        typer.Option(help="Whether edits get the source's detail.", show_default="the server's"),
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
    queue: Annotated[
        bool, typer.Option("--queue", help="Cameras wait for an editor where there is no room.")
    ] = False,
    simulate: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT",
            help="Simulate a day instead, of editors as fast as this bench stream --json report "
            "says: --sessions at its busiest, --kills machines lost, max_editors=N.",
        ),
    ] = None,
    hours: Annotated[
        float, typer.Option(help="That --simulate simulates, from midnight.", min=1)
    ] = 24.0,
    cold: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="That --simulate lets an editor take to be there; null: as the report says, "
            "which knows of no machine that has to come first.",
            min=0,
        ),
    ] = None,
    ways: Annotated[
        str | None,
        typer.Option(
            help="To decide that --simulate sets beside each other, commas between; null for all."
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure live sessions: latency, jitter, deadlines, and what is not the model.

    Starts the application as liveedit serve does (with --kills two editors and two fronts), or
    measures a running one. A chunk's latency runs from when its last source frame was sent until
    its first edited frame came; overhead is what of it is not the model's compute.
    """
    import torch

    from modeling.detail.work_size import work_size as edited_at
    from pipelines.bench.machine import hardware
    from pipelines.bench.room import held, until_left
    from pipelines.bench.serve import (
        TAIL_S,
        at_random,
        facts,
        killer,
        memory_table,
        parse_attacks,
        parse_ways,
        soak_line,
        table,
    )
    from pipelines.bench.soak import HeldMemory, seconds_of
    from pipelines.commands.serve import application, serve_settings
    from serve.client import served_model
    from serve.client.cameras import CameraLoad, measure

    counts, attacks = parse_numbers("--sessions", sessions, 1), parse_attacks(attack)
    if url is not None and kills:
        raise UserError("--kills kills replicas of an application started here; leave --url out")
    lasting = seconds_of(soak) if soak is not None else 0.0
    if url is not None and soak is not None:
        raise UserError(
            "--soak looks at the memory of an application started here; leave --url out"
        )
    if chaos and not kills:
        raise UserError("--chaos draws who is killed; say how many with --kills")
    if simulate is not None and (url is not None or attacks or len(counts) > 1):
        raise UserError(
            "--simulate takes one number of --sessions and starts no server; leave --url, --attack "
            "and further numbers out"
        )
    check_folders(json_file)
    if simulate is not None:
        rules = parse_ways(ways)
        day = _day(simulate, arguments or [], counts[0], fps or 16.0, kills, hours, cold)
        _simulate(day, rules, json_file)
        return
    runs: list[dict[str, object]] = []
    with ExitStack() as stack, errors.status("starting") as status:
        running: Running | None = None
        if url is None:
            several = {"min_editors": 2, "max_editors": 2, "fronts": 2} if kills else {}
            settings = serve_settings(arguments or [], several)
            running = stack.enter_context(application(settings))
            url = running.stream_url
            model = {**running.models()[0], "work_size": settings.work_size}
        elif arguments:
            raise UserError(f"--url measures what runs there; leave {arguments[0]} out")
        else:
            model = served_model(url, token=token)
        height, width = parse_size(size) if size else (model["height"], model["width"])
        trained = model["height"], model["width"]
        edited_at(work_size or model["work_size"], height, width, trained)  # or it is refused here
        load = CameraLoad(
            width,
            height,
            fps or model["fps"],
            mode,
            format,
            seconds,
            token,
            queue,
            work_size,
            detail,
        )
        before = held(url) if attacks else 0
        for count in counts:
            status.update(f"{count} sessions, {seconds:g} s")
            runs.append(measure(url, load, count).to_dict())
        for name in attacks:
            status.update(f"{max(counts)} sessions beside {name}, {seconds:g} s")
            runs.append(measure(url, load, max(counts), attacks=[name]).to_dict())
            status.update(f"{name} is over, waiting for its places")
            until_left(url, before)
        memory, soaked = HeldMemory(), list[dict[str, object]]()
        while memory.seconds < lasting:
            status.update(f"{max(counts)} sessions, {memory.seconds:.0f} of {lasting:g} s")
            found = measure(url, load, max(counts), every_second=memory.sample)
            soaked.append(found.to_dict())
        runs += soaked[-1:]
        if running is not None and kills:
            load = replace(load, seconds=max(seconds, kills * kill_every + TAIL_S))
            status.update(f"{max(counts)} sessions, {kills} kills, {load.seconds:g} s")
            kill = killer(running, kills, at_random() if chaos else None)
            runs.append(
                measure(url, load, max(counts), kill=kill, kill_every_s=kill_every).to_dict()
            )
    report: dict[str, Any] = {
        "hardware": hardware(torch.device(str(model["device"]))),
        "model": model,
        "runs": runs,
        **({"soak": soaked, "memory": memory.growth()} if soak else {}),
    }
    console.print(facts(report, load), soft_wrap=True)
    console.print(table(runs))
    if soak:
        console.print(soak_line(soaked), soft_wrap=True)
        console.print(memory_table(memory.growth()))
    write_report(report, json_file)


def _day(
    costs: Path,
    arguments: list[str],
    sessions: int,
    fps: float,
    machines: int,
    hours: float,
    cold: float | None,
) -> Day:
    from pipelines.bench.check import read_report
    from pipelines.bench.simulation.day import Day, measured, usual_rolls
    from pipelines.commands.serve import serve_settings

    settings = serve_settings(arguments, {})
    day = Day(
        sessions,
        scale=settings.scale,
        max_sessions=settings.max_sessions,
        fps=fps,
        lost_machines=machines,
        hours=hours,
        rolls=usual_rolls(hours),
        **measured(read_report(costs)),
    )
    return day if cold is None else replace(day, start_s=cold)


def _simulate(day: Day, rules: dict[str, Rules], json_file: Path | None) -> None:
    from pipelines.bench.simulation.tally import table
    from pipelines.bench.simulation.world import simulate

    results: dict[str, dict[str, float]] = {}
    logging.disable(logging.ERROR)  # what the simulated hub says of its editors and versions
    try:
        with errors.status("simulating") as status:
            for name, rule in rules.items():
                status.update(f"simulating {day.hours:g} h: {name}")
                results[name] = simulate(day, rule)
    finally:
        logging.disable(logging.NOTSET)
    console.print(table(day, results))
    write_report({"runs": results}, json_file)
