"""The demo's video through the registered model, served and streamed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from data.video import probe
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages.edit import PROMPT
from pipelines.stages.edit_file import expected_frames
from pipelines.stages.register import PipelineResult
from pipelines.stages.running.runner import StageRunner
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import StageRecord, fingerprint_of


def served_reference(config: PipelineConfig, result: PipelineResult) -> str:
    """The registered model that the demo serves: production, or the candidate if not promoted; its
    folder as long as MLflow has not taken it."""
    if result.version is None:
        return str(result.model)
    return f"models:/{config.tracking.model_name}@{result.aliases[-1]}"


def stream_live(
    runner: StageRunner,
    result: PipelineResult,
    config: PipelineConfig,
    serving: Callable[[str], AbstractContextManager[str]],
) -> StageRecord:
    """The demo's last stage: serve the registered model and stream the video through it.

    `serving` starts the application with a model and gives the address of its streams.
    """
    source, video = result.output / "source.mp4", result.output / "live.mp4"
    frames = expected_frames(probe(source))
    reference = served_reference(config, result)

    def make(run: Run, key: str) -> dict[str, float]:
        from pipelines.stages.edit_remote import film_file, live_numbers  # seconds to import

        run.used({"model": result.model})
        runner.view.update("live", 0, frames, f"starting {reference}")
        with serving(reference) as url:
            report = film_file(
                url,
                source,
                video,
                PROMPT,
                progress=lambda n: runner.view.update("live", n, frames, f"{n}/{frames} frames"),
            )
        run.log_artifact(video)
        return live_numbers(report)

    inputs = {
        "model": fingerprint_of(result.model),
        "reference": reference,
        "video": fingerprint_of(source),
        "prompt": PROMPT,
    }
    return runner.run("live", 2, inputs, video, make)
