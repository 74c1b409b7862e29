"""What is edited to be shown, without a training around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.video import probe
from modeling.editor import StreamingEditor
from pipelines.config.pipeline import PipelineConfig
from pipelines.evaluation.evaluate import EditedClip
from pipelines.training import validation
from pipelines.training.run_folder import RunFolder
from pipelines.training.validation import Validation

HEIGHT, WIDTH, FRAMES, FPS = 16, 32, 5, 12.0


def clip(level: int) -> EditedClip:
    pixels = np.full((FRAMES, HEIGHT, WIDTH, 3), level, np.uint8)
    mask = np.ones((FRAMES, HEIGHT, WIDTH), bool)
    return EditedClip("make it", pixels, pixels, pixels, mask, mask, {"recomputed": 1.0})


@pytest.mark.parametrize(
    ("mean", "told"),
    [
        ({"gain": 3.0, "background_psnr": 40.0, "ssim": 0.5},
         {"validation_loss": 1.0, "validation_gain": 3.0, "validation_background_psnr": 40.0}),
        ({"background_psnr": 40.0}, {"validation_loss": 1.0, "validation_background_psnr": 40.0}),
    ],
)  # fmt: skip
def test_the_first_clips_are_edited_as_evaluation_is_set_and_as_many_as_the_stage_says(
    mean: dict[str, float],
    told: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked: list[Any] = []
    text = SimpleNamespace(release=lambda: asked.append("let go"))

    def evaluate(
        used: Any, dataset: str, settings: Any, *, on_clip: Callable[[EditedClip], None]
    ) -> dict[str, Any]:
        assert (used, used.text, dataset) == (editor, text, "heldout")
        assert (settings.clips, settings.dilate) == (2, 3)
        asked.append("edited")
        for level in (40, 200):
            on_clip(clip(level))
        return {"mean": mean}

    def load(model: Path, device: torch.device) -> Any:
        asked.append((model, device))
        return editor

    editor = SimpleNamespace(settings=SimpleNamespace(fps=FPS))
    monkeypatch.setattr(StreamingEditor, "load", load)
    monkeypatch.setattr(Validation, "_prompts", lambda self: text)
    monkeypatch.setattr(validation, "evaluate", evaluate)
    config = PipelineConfig()
    config.evaluate.clips, config.evaluate.dilate = 7, 3
    config.foundation.sample_clips = 2
    setting = SimpleNamespace(
        config=config,
        section=config.foundation,
        job=SimpleNamespace(heldout="heldout"),
        device=torch.device("cpu"),
    )
    folder = RunFolder(tmp_path)
    judged = Validation(setting, None, None, folder, lambda place: None)  # type: ignore[arg-type]
    judged.last = {"validation_loss": 1.0}
    files = judged.edit(tmp_path / "model", 5)
    assert asked == [(tmp_path / "model", torch.device("cpu")), "edited", "let go"]
    assert judged.last == told
    place = tmp_path / "validation" / "step-000005"
    names = ["sample-0.mp4", "sample-1.mp4", "samples.png"]
    assert files == {str(place / name): "validation/step-000005" for name in names}
    for name in names[:2]:
        found = probe(place / name)
        assert (found.width, found.height, found.fps) == (3 * WIDTH, HEIGHT, FPS)
        assert found.frames == FRAMES
    with Image.open(place / "samples.png") as picture:
        assert {40, 200} <= set(np.asarray(picture)[..., 0].ravel().tolist())
