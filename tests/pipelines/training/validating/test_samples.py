"""What is edited to be shown, without a training around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling.editor import StreamingEditor
from pipelines.config.pipeline import PipelineConfig
from pipelines.training import validation
from pipelines.training.run_folder import RunFolder
from pipelines.training.validation import Validation


def test_the_first_clips_are_edited_as_evaluation_is_set_and_as_many_as_the_stage_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class AskedError(Exception):
        """Ends the edit where it begins."""

    def ask(editor: object, dataset: str, settings: object, **options: object) -> None:
        raise AskedError(editor, dataset, settings)

    editor = SimpleNamespace()
    monkeypatch.setattr(StreamingEditor, "load", lambda *given, **options: editor)
    monkeypatch.setattr(Validation, "_prompts", lambda self: "the clips' text")
    monkeypatch.setattr(validation, "evaluate", ask)
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
    with pytest.raises(AskedError) as asked:
        judged.edit(tmp_path, 5)
    used, dataset, settings = asked.value.args
    assert (used, used.text, dataset) == (editor, "the clips' text", "heldout")
    assert (settings.clips, settings.dilate) == (2, 3)
