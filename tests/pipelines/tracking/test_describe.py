"""The text of a version's page, as a person reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipelines.stages.chain import STAGES
from pipelines.tracking import describe
from pipelines.tracking.describe import description, note


def test_a_card_s_values_are_words_and_round_figures(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    card = {
        "name": "tiny",
        "prompts": ["make it dawn", "add fog | rain"],
        "metrics": {"loss": 0.16454592347, "steps": 30},
        "parent": {"path": "/m", "fingerprint": "0123456789ab" + "c" * 52},
        "commit": "0123456789ab" + "d" * 28,
        "quantised": False,
        "words": ["w" * 400],
    }
    (model / "card.json").write_text(json.dumps(card))
    reference = "models:/liveedit/3"
    lines = description(reference, model, {"gain": 12.3456}, "m-1").splitlines()
    told = lines[lines.index("| card | |") + 2 :]
    assert told[: told.index("")] == [
        "| name | tiny |",
        "| prompts | make it dawn, add fog / rain |",
        "| metrics | loss 0.1645, steps 30 |",
        "| parent | path /m, fingerprint 0123456789ab |",
        "| commit | 0123456789ab |",
        "| quantised | false |",
    ]
    assert "| gain | 12.35 |" in lines
    assert (
        'liveedit edit in.mp4 out.mp4 --prompt "make it dawn" --model models:/liveedit/3' in lines
    )


def test_a_version_says_who_made_it_with_what(tiny_model: Path) -> None:
    made_by = {
        "mlflow.user": "ann",
        "mlflow.source.name": "liveedit train demo",
        "mlflow.source.git.commit": "4f0417200000" + "e" * 28,
    }
    lines = description("models:/m/1", tiny_model, {}, "m-1", (), made_by).splitlines()
    assert "Made by ann with `liveedit train demo`, code 4f0417200000." in lines
    assert "Made by" not in description("models:/m/1", tiny_model, {}, "m-1")


def test_every_stage_has_a_description() -> None:
    assert set(STAGES) | {"edit", "live"} == set(describe.STAGES)
    assert note("vae") == {"mlflow.note.content": describe.STAGES["vae"]}
    assert note() == {"mlflow.note.content": describe.PIPELINE}
    assert note("one of a test's") == {}
