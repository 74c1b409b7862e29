"""The demo's video: held-out objects and edits, edited as `liveedit edit` does."""

from __future__ import annotations

from pathlib import Path

from data.sample import Pair
from data.synthetic import make_pair
from data.video import VideoWriter
from modeling.model_dir import read_config
from pipelines.evaluation.evaluate import load_editor
from pipelines.stages.edit_file import edit_video
from pipelines.stages.register import PipelineResult
from pipelines.stages.runner import StageRunner
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import fingerprint_of

VIDEO_FRAMES = 81  # 5 s: longer than the clips of training and than the model's window
VIDEO_SEED = 108


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
