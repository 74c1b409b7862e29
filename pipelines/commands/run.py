"""What `liveedit demo` and `train` run: the pipeline with its lines, and where everything is."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from rich.console import Console

from pipelines.commands.made import open_page, write_page
from pipelines.commands.show import command_name, item, metrics_table, short
from pipelines.config.load import load_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.evaluation.evaluate import table_rows
from pipelines.pipeline import plan_pipeline, run_pipeline
from pipelines.stages.chain import STAGES
from pipelines.stages.edit import PROMPT, edit_sample
from pipelines.stages.live import served_reference, stream_live
from pipelines.stages.register import PipelineResult
from pipelines.stages.running.choice import Choice
from pipelines.stages.running.plan import known_card, legend, table
from pipelines.stages.running.progress import StageView
from pipelines.stages.running.runner import EVERYTHING, StageRunner
from pipelines.tracking.tracker import SIDE, UI


def run_demo(overrides: list[str], console: Console) -> None:
    """Make pairs, train, evaluate, register, edit a video, serve; say where everything is, and show
    it where there is a browser."""
    config = load_config("demo", overrides)
    started = time.monotonic()
    live: dict[str, float] = {}

    def then(runner: StageRunner, result: PipelineResult) -> None:
        edit_sample(runner, result)
        serving = partial(serving_demo, config)
        live.update(stream_live(runner, result, config, serving).metrics)

    result = _run(config, StageView(console, (*STAGES, "edit", "live")), then=then)
    assert result is not None  # all stages were chosen
    console.print(f"\nDone in {time.monotonic() - started:.0f} s.")
    print_result(config, result, console)
    source, video = result.output / "source.mp4", result.output / "edited.mp4"
    page = write_page(result)
    _print_lines(
        console,
        {
            "before": short(source),
            "after": f"{short(video)}  ({PROMPT})",
            "live": f"{short(result.output / 'live.mp4')}  "
            f"({served_reference(config, result)} over WebSocket: {_live_numbers(live)})",
            "page": f"{short(page)}  (all of this to look at)",
        },
    )
    again = shlex.join(["edit", short(source), "mine.mp4", "--prompt", "make it night"])
    us = command_name("liveedit")
    console.print("\nTry next", style="bold")
    console.print(
        f"  {us} serve                      your webcam, on a page, with this model\n"
        f"  {us} {again}\n"
        f"  {us} train demo data.footage=FOLDER   the same on your own photos and clips\n"
        f"  {us} data ingest --help         bring your own pairs\n"
        f"  {us} train wan-1.3b --dry-run   the same pipeline at full size",
        soft_wrap=True,
    )
    open_page(page, console)


def run_train(
    config: PipelineConfig, console: Console, *, first: str | None = None, only: str | None = None
) -> None:
    """Run the pipeline, or the stages chosen, and say where everything is."""
    result = _run(config, StageView(console, STAGES), Choice(STAGES, first, only))
    if result:
        print_result(config, result, console)


def print_plan(
    config: PipelineConfig,
    console: Console,
    *,
    first: str | None = None,
    only: str | None = None,
    card: str | None = None,
) -> bool:
    """What `run_train` would do, on GPUs called `card` (None: this machine's); whether that is
    anything."""
    card = known_card(card)
    lines = plan_pipeline(config, StageView(console, ()), Choice(STAGES, first, only), card)
    console.print(table(lines))
    for line in legend(lines, card, config.compute):
        console.print(line, soft_wrap=True)
    return any(line.runs for line in lines)


def print_result(config: PipelineConfig, result: PipelineResult, console: Console) -> None:
    """Metrics, and where model, runs and pictures are."""
    console.print()
    console.print(metrics_table(table_rows(result.metrics)))
    console.print()
    name = config.tracking.model_name
    known = f"version {result.version}: " if result.version else "not in the registry yet: "
    references = known + ", ".join(f"models:/{name}@{alias}" for alias in result.aliases)
    ui = f"{command_name('mlflow')} ui --backend-store-uri {config.tracking.uri}"
    server = str(config.tracking.uri) if str(config.tracking.uri).startswith("http") else None
    links = mlflow_pages(server or UI, config, result)
    _print_lines(
        console,
        {
            "model": f"{short(result.model)}  ({references})",
            **({} if server else {"MLflow": ui}),
            "runs": links["runs"],
            **({"version": links["version"]} if result.version else {}),
            "metrics": f"{short(result.table)}, {short(result.report)}",
            "picture": short(result.picture),
        },
    )
    if result.shortfalls:
        reasons = "; ".join(result.shortfalls)
        console.print(f"  not promoted to production: {reasons}", soft_wrap=True)


def mlflow_pages(server: str, config: PipelineConfig, result: PipelineResult) -> dict[str, str]:
    """Addresses that open this run and its version. Nothing is asked: MLflow may be gone by now."""
    if result.version is None or result.experiment_id is None:
        return {"runs": f"{server}/#/experiments?{SIDE}"}
    version = f"models/{config.tracking.model_name}/versions/{result.version}"
    return {
        "runs": f"{server}/#/experiments/{result.experiment_id}/runs/{result.run_id}?{SIDE}",
        "version": f"{server}/#/{version}?{SIDE}",
    }


def _run(
    config: PipelineConfig,
    view: StageView,
    choice: Choice = EVERYTHING,
    *,
    then: Callable[[StageRunner, PipelineResult], None] | None = None,
) -> PipelineResult | None:
    try:
        with view:
            return run_pipeline(config, view, choice=choice, then=then)
    except KeyboardInterrupt as interrupt:
        view.console.print(
            f"\nStopped. Finished and kept: {', '.join(view.finished) or 'nothing yet'}. "
            "Run the same command again to go on.",
            *getattr(interrupt, "__notes__", []),
            soft_wrap=True,
        )
        raise


@contextmanager
def serving_demo(config: PipelineConfig, reference: str) -> Iterator[str]:
    """The application with the model behind `reference`; the address of its streams."""
    from pipelines.commands.serve import application, serve_settings  # seconds to import

    with application(serve_settings([reference]), registry=config.tracking.uri) as running:
        yield running.stream_url


def _live_numbers(live: Mapping[str, float]) -> str:
    texts = {
        "edited": "{:.0f} frames edited",
        "dropped": "{:.0f} dropped",
        "first_chunk_s": "first chunk after {:.1f} s",
        "fps": "{:.1f} fps",
        "latency_s": "latency {:.2f} s",
    }
    return ", ".join(text.format(live[name]) for name, text in texts.items() if name in live)


def _print_lines(console: Console, lines: dict[str, str]) -> None:
    for name, value in lines.items():
        console.print(item(name, value, 9), soft_wrap=True)
