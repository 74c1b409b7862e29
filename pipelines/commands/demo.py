"""`liveedit demo` and `liveedit train`: the pipeline with its lines, and where everything is."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from data.sample import Pair
from data.synthetic import make_pair
from data.video import VideoWriter
from modeling.model_dir import read_config
from pipelines.commands.show import command_name, metrics_table, short
from pipelines.config.load import load_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.evaluation.evaluate import load_editor, table_rows
from pipelines.pipeline import STAGES, PipelineResult, run_pipeline
from pipelines.stages.edit import edit_video
from pipelines.stages.progress import StageView
from pipelines.stages.runner import StageRunner
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import StageRecord, fingerprint_of

VIDEO_FRAMES = 81  # 5 s: longer than the clips of training and than the model's window
VIDEO_SEED = 108


def run_demo(overrides: list[str], console: Console) -> None:
    """Make pairs, train, evaluate, register, edit a video, serve; then say where everything is."""
    config = load_config("demo", overrides)
    started = time.monotonic()
    live: dict[str, float] = {}

    def then(runner: StageRunner, result: PipelineResult) -> None:
        edit_heldout(runner, result)
        live.update(stream_live(runner, result, config).metrics)

    result = _run(config, StageView(console, (*STAGES, "edit", "live")), then=then)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s.")
    print_result(config, result, console)
    source, video = result.output / "source.mp4", result.output / "edited.mp4"
    prompt = heldout_video(result.model).instruction
    _print_lines(
        console,
        {
            "before": short(source),
            "after": f"{short(video)}  ({prompt})",
            "live": f"{short(result.output / 'live.mp4')}  "
            f"({served_reference(config, result)} over WebSocket: {_live_numbers(live)})",
        },
    )
    again = shlex.join(["edit", short(source), "mine.mp4", "--prompt", prompt, "--seed", "1"])
    us = command_name("liveedit")
    console.print(
        "\n[bold]Try next[/]\n"
        f"  {us} {again}\n"
        f"  {us} serve                      your webcam, on a page\n"
        f"  {us} demo distill.steps=400     train the last stage longer\n"
        f"  {us} data ingest --help         bring your own pairs\n"
        f"  {us} train wan-1.3b --dry-run   the same pipeline at full size",
        soft_wrap=True,
    )


def run_train(config: PipelineConfig, console: Console) -> None:
    """Run the pipeline and say where everything is."""
    result = _run(config, StageView(console, STAGES))
    print_result(config, result, console)


def print_result(config: PipelineConfig, result: PipelineResult, console: Console) -> None:
    """Metrics, and where model, runs and pictures are."""
    console.print()
    console.print(metrics_table(table_rows(result.metrics)))
    console.print()
    name = config.tracking.model_name
    known = f"version {result.version}: " if result.version else "not in the registry yet: "
    references = known + ", ".join(f"models:/{name}@{alias}" for alias in result.aliases)
    ui = f"{command_name('mlflow')} ui --backend-store-uri {config.tracking.uri}"
    if str(config.tracking.uri).startswith("http"):
        ui = str(config.tracking.uri)
    _print_lines(
        console,
        {
            "model": f"{short(result.model)}  ({references})",
            "runs": ui,
            "metrics": f"{short(result.table)}, {short(result.report)}",
            "picture": short(result.picture),
        },
    )
    if result.shortfalls:
        reasons = "; ".join(result.shortfalls)
        console.print(f"  not promoted to production: {reasons}", soft_wrap=True)


def heldout_video(model: Path) -> Pair:
    """A synthetic pair of `VIDEO_FRAMES` frames whose combination no training pair shows."""
    stream = read_config(model).stream
    return make_pair(
        VIDEO_SEED,
        height=stream.height,
        width=stream.width,
        frames=VIDEO_FRAMES,
        fps=stream.fps,
        split="heldout",
    )


def _run(
    config: PipelineConfig,
    view: StageView,
    *,
    then: Callable[[StageRunner, PipelineResult], None] | None = None,
) -> PipelineResult:
    try:
        with view:
            return run_pipeline(config, view, then=then)
    except KeyboardInterrupt as interrupt:
        view.console.print(
            f"\nStopped. Finished and kept: {', '.join(view.finished) or 'nothing yet'}. "
            "Run the same command again to go on.",
            *getattr(interrupt, "__notes__", []),
        )
        raise


def edit_heldout(runner: StageRunner, result: PipelineResult) -> None:
    """Edit a video file as `liveedit edit` does."""
    pair = heldout_video(result.model)
    source, video = result.output / "source.mp4", result.output / "edited.mp4"
    frames, height, width = pair.video_shape

    def make(run: Run, key: str) -> dict[str, float]:
        with VideoWriter(source, width, height, pair.fps) as writer:
            writer.write(pair.source)
        report = edit_video(
            load_editor(result.model),
            source,
            video,
            pair.instruction,
            progress=lambda n: runner.view.update("edit", n, frames, f"{n}/{frames} frames"),
        )
        run.log_artifact(video)
        return {"frames": float(report.frames), "fps": report.fps}

    inputs = {
        "model": fingerprint_of(result.model),
        "origin": pair.origin,
        "size": [frames, height, width],
    }
    runner.run("edit", 1, inputs, video, make, still_there=lambda record: source.is_file())


def served_reference(config: PipelineConfig, result: PipelineResult) -> str:
    """The registered model that the demo serves: production, or the candidate if not promoted; its
    folder as long as MLflow has not taken it."""
    if result.version is None:
        return str(result.model)
    return f"models:/{config.tracking.model_name}@{result.aliases[-1]}"


def stream_live(runner: StageRunner, result: PipelineResult, config: PipelineConfig) -> StageRecord:
    """The demo's last stage: serve the registered model and stream the video through it."""
    pair = heldout_video(result.model)
    source, video = result.output / "source.mp4", result.output / "live.mp4"
    frames = pair.video_shape[0]
    reference = served_reference(config, result)

    def make(run: Run, key: str) -> dict[str, float]:
        # Ray Serve takes seconds to import.
        from pipelines.commands.serve import application, serve_settings
        from pipelines.stages.live import film_file, live_numbers

        runner.view.update("live", 0, frames, f"starting {reference}")
        with application(serve_settings([reference]), registry=config.tracking.uri) as running:
            report = film_file(
                running.stream_url,
                source,
                video,
                pair.instruction,
                progress=lambda n: runner.view.update("live", n, frames, f"{n}/{frames} frames"),
            )
        run.log_artifact(video)
        return live_numbers(report)

    inputs = {
        "model": fingerprint_of(result.model),
        "reference": reference,
        "origin": pair.origin,
        "frames": frames,
    }
    return runner.run("live", 1, inputs, video, make)


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
        console.print(f"  [bold]{name:<9}[/]{value}", soft_wrap=True)
