"""`liveedit bench train`: the command line of the training benchmark."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from infra.runtime.errors import UserError
from pipelines.commands.measure.reports import Check, JsonFile, check_folders, judge, write_report
from pipelines.commands.options import parse_numbers
from pipelines.commands.show import console, errors


def bench_train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="As for `liveedit train`: a YAML file, or demo, wan-1.3b, wan-14b; then settings.",
            show_default="wan-1.3b on GPUs, demo on a CPU",
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE,STAGE", help="What to time.", show_default="foundation,causal,distill"
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Workers, one a GPU; without GPUs so many processes.",
            show_default="1",
        ),
    ] = None,
    zero: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="ZeRO stages.", show_default="the configuration's"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Timed steps of a case, after one that is not; with --kills all steps.",
            show_default="5, or 10 a kill",
        ),
    ] = None,
    kills: Annotated[
        int,
        typer.Option(
            help="Kill workers at so many drawn steps instead, and compare the final weights."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the steps and workers of --kills.")] = 0,
    signals: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="How workers end, in turn: kill (at once), term (told to, they save first).",
        ),
    ] = "kill",
    json_file: JsonFile = None,
    check: Check = None,
) -> None:
    """Time training steps: seconds, model TFLOP/s, MFU, memory, waiting for data.

    Runs the loop that training runs, with DeepSpeed but without Ray, on drawn
    weights and latents. --check compares ratios inside a run, so that machines
    may differ.

    With --kills it runs a small training (demo, distill, 2 workers, if nothing
    else is said) twice under Ray, once killing workers, and ends with 1 if the
    weights are not the same bits.
    """
    import torch

    from pipelines.bench.check import read_report, require_same_work
    from pipelines.bench.train import STAGES, TrainOptions, measure
    from pipelines.config.load import load_config

    check_folders(json_file)
    given = list(arguments or [])
    if kills:
        from pipelines.bench.kills import measure as measure_kills

        source = given.pop(0) if given and "=" not in given[0] else "demo"
        (workers,) = parse_numbers("--gpus", gpus or "2", 1)[:1]
        ends = tuple(name.strip() for name in signals.split(","))
        with errors.status("starting") as status:
            report = measure_kills(
                load_config(source, given), stages or "distill", workers, kills, steps, seed, ends,
                status.update,
            )  # fmt: skip
        write_report(report, json_file)
        _show_kills(report, kills)
        return
    stored = read_report(check) if check else None
    cuda = torch.cuda.is_available()
    source = given.pop(0) if given and "=" not in given[0] else "wan-1.3b" if cuda else "demo"
    config = load_config(source, given)
    options = TrainOptions(
        config=config,
        cuda=cuda,
        stages=tuple(name.strip() for name in (stages or ",".join(STAGES)).split(",")),
        workers=parse_numbers("--gpus", gpus or "1", 1),
        zero=parse_numbers("--zero", zero, 0) if zero else (config.compute.zero_stage,),
        steps=5 if steps is None else steps,
    )

    def same_work(begun: dict[str, Any]) -> None:
        if stored is not None:
            require_same_work(begun, stored)

    report = {}
    with errors.status("starting") as status:
        for report in measure(options, same_work, status.update):
            write_report(report, json_file)
    console.print(table(report))
    console.print(fact(report), soft_wrap=True)
    judge(report, stored, check)


def _show_kills(report: dict[str, Any], kills: int) -> None:
    """Raises UserError where the kills changed the weights, or too few of them were."""
    console.print(kills_table(report))
    done = len(report["kills"])
    console.print(
        f"{report['stage']}, {report['workers']} workers, {report['steps']} steps: "
        f"{report['seconds_alone']:.1f} s alone, {report['seconds_killed']:.1f} s with "
        f"{done} kills",
        soft_wrap=True,
    )
    if report["different"]:
        raise UserError(
            f"{len(report['different'])} weights differ after the kills, {report['different'][0]} "
            "is the first: a training that goes on from a checkpoint is not the one it was"
        )
    console.print("The weights are the same, bit for bit.", soft_wrap=True)
    if done < kills:
        raise UserError(f"the training ended before {kills - done} of the kills; give more --steps")


def kills_table(report: dict[str, Any]) -> Table:
    """A row a kill."""
    view = Table(title="kills", title_justify="left")
    for name in ("at step", "worker", "by", "went on from step", "s lost"):
        view.add_column(name, justify="right")
    for kill in report["kills"]:
        lost = "-" if kill["lost"] is None else f"{kill['lost']:.1f}"
        row = (kill["step"], kill["worker"], kill["signal"], kill["from_step"], lost)
        view.add_row(*map(str, row))
    return view


def table(report: dict[str, Any]) -> Table:
    """A row a case."""
    view = Table(title="training steps", title_justify="left")
    view.add_column("")
    for name in ("s a step", "TFLOP/s", "MFU", "data wait", "peak GiB", "start s"):
        view.add_column(name, justify="right")
    for case in report["cases"]:
        if case["out_of_memory"]:
            view.add_row(case["name"], "out of memory")
            continue
        view.add_row(
            case["name"],
            f"{case['seconds']:.3g}",
            f"{case['tflops']:.3g}",
            f"{case['mfu']:.1%}" if case["mfu"] else "-",
            f"{case['data_wait_s'] / case['seconds']:.1%}",
            f"{case['reserved_gib']:.1f}" if case["reserved_gib"] else "-",
            f"{case['start_s']:.1f}",
        )
    return view


def fact(report: dict[str, Any]) -> str:
    """What all rows were measured on."""
    config, machine = report["config"], report["hardware"]
    return (
        f"{config['model']}, {config['frames']} frames at {config['width']}x{config['height']}, "
        f"{config['compute']['precision']}; {machine.get('gpu') or machine['cpu']}, torch "
        f"{machine['torch']}, which multiplies matrices at {report['yardstick']['tflops']:.3g} "
        "TFLOP/s. TFLOP/s and MFU are a worker's, by model FLOPs: forward and backward count as "
        "three forwards, recomputation as none"
    )
