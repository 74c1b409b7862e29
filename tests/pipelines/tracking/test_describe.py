"""The text of a version's page, as a person reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipelines.tracking.describe import description


def test_a_card_s_values_are_words_and_round_figures(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    card = {
        "name": "tiny",
        "prompts": ["make it night", "add fog | rain"],
        "metrics": {"loss": 0.16454592347, "steps": 30},
        "quantised": False,
        "words": ["w" * 400],
    }
    (model / "card.json").write_text(json.dumps(card))
    reference = "models:/liveedit/3"
    lines = description(reference, model, {"gain": 12.3456}, "m-1").splitlines()
    told = lines[lines.index("| card | |") + 2 :]
    assert told[: told.index("")] == [
        "| name | tiny |",
        "| prompts | make it night, add fog / rain |",
        "| metrics | loss 0.1645, steps 30 |",
        "| quantised | false |",
    ]
    assert "| gain | 12.35 |" in lines
    assert (
        'liveedit edit in.mp4 out.mp4 --prompt "make it night" --model models:/liveedit/3' in lines
    )
