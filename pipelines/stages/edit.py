"""The demo's video: a clip of real footage that no training saw, edited as `liveedit edit` does."""

from __future__ import annotations

import shutil
from pathlib import Path

from data.video import probe
from infra.runtime.paths import ROOT
from pipelines.evaluation.evaluate import load_editor
from pipelines.stages.edit_file import edit_video, expected_frames
from pipelines.stages.register import PipelineResult
from pipelines.stages.running.runner import StageRunner
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import fingerprint_of

CLIP = ROOT / "data" / "samples" / "footage" / "flower.mp4"
PROMPT = "make it sunset"


def edit_sample(runner: StageRunner, result: PipelineResult, clip: Path = CLIP) -> None:
    """Edit a video file as `liveedit edit` does; a copy of it lies beside the result."""
    source, video = result.output / "source.mp4", result.output / "edited.mp4"
    frames = expected_frames(probe(clip))

    def make(run: Run, key: str) -> dict[str, float]:
        run.used({"model": result.model})
        shutil.copyfile(clip, source)
        report = edit_video(
            load_editor(result.model),
            source,
            video,
            PROMPT,
            progress=lambda n: runner.view.update("edit", n, frames, f"{n}/{frames} frames"),
        )
        run.log_artifact(video)
        return {"frames": float(report.frames), "fps": report.fps}

    inputs = {
        "model": fingerprint_of(result.model),
        "clip": fingerprint_of(clip),
        "prompt": PROMPT,
    }
    runner.run("edit", 2, inputs, video, make, still_there=lambda record: source.is_file())
