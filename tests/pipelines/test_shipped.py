"""What ships: the model on real video with its card, and the samples."""

from __future__ import annotations

import json
from pathlib import Path

from data.footage.material import read_heldout
from infra.runtime.paths import ROOT
from modeling.text.words import unknown_words
from pipelines.config.load import load_config

MODEL = ROOT / "pipelines" / "start" / "natural"
SAMPLES = ROOT / "data" / "samples"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_shipped_model_is_small_and_its_card_says_what_it_can_and_whence_it_is() -> None:
    assert size(MODEL) <= 16e6
    card = json.loads((MODEL / "card.json").read_text())
    for told in ("what", "can", "cannot", "examples", "sources", "how", "made"):
        assert card[told], told
    assert card["made"]["order"][-1].startswith("distill")
    assert all("CC" in source or "MIT" in source for source in card["sources"])
    asked = [*card["prompts"], *(example["prompt"] for example in card["examples"])]
    assert {word for prompt in asked for word in unknown_words(prompt, card["words"])} == set()
    # Taught in vain: whoever asks for it is told, as of any word that it does not know.
    assert unknown_words("Make it snow!", card["words"]) == ["snow"]
    recipe = card["how"].split()[0]
    assert load_config(ROOT / recipe).model.preset == "natural"  # it can still be run


def test_samples_are_small_licensed_and_what_is_shown_is_held_out() -> None:
    assert size(SAMPLES) + size(ROOT / "data" / "bench" / "footage") <= 6e6
    files = {
        path.name for path in (SAMPLES / "footage").iterdir() if path.suffix in (".jpg", ".mp4")
    }
    licences = (SAMPLES / "footage" / "LICENCES.md").read_text()
    assert "CC0-1.0" in licences
    assert {name for name in files if name not in licences} == set()
    assert "flower.mp4" in (read_heldout(SAMPLES / "footage") or ())
