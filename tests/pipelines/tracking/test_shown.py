"""What MLflow's pages show: whose a version is, a card in words, a picture made small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling.fingerprint import model_fingerprint
from modeling.model_dir import read_config
from pipelines.tracking.describe import description, in_words
from pipelines.tracking.lineage import signature
from pipelines.tracking.preview import preview
from pipelines.tracking.records import digest_of

COMMIT, HASH = "0123456789ab" + "c" * 28, "0123456789ab" + "d" * 52


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ({}, ""),
        ({"mlflow.user": "ann"}, "Made by ann, code unknown."),
        ({"mlflow.source.name": "x"}, "Made by with `x`, code unknown."),
        ({"mlflow.user": "ann", "mlflow.source.name": "x", "mlflow.source.git.commit": COMMIT},
         "Made by ann with `x`, code 0123456789ab."),
        ({"mlflow.user": "ann", "mlflow.source.git.commit": f"{COMMIT}-dirty"},
         "Made by ann, code 0123456789ab-dirty."),
    ],
)  # fmt: skip
def test_whose_a_version_is(tags: dict[str, str], told: str, tiny_model: Path) -> None:
    lines = description("models:/m/1", tiny_model, {}, "m-1", (), tags).splitlines()
    assert [line for line in lines if line.startswith("Made by")] == ([told] if told else [])


def test_what_a_version_is_for(tiny_model: Path) -> None:
    stream = read_config(tiny_model).stream
    metrics = {"b": 2.0, "a": 0.123456}
    lines = description("models:/m/1", tiny_model, metrics, "m-1").splitlines()
    assert lines[0] == (
        f"Edits video live, {stream.chunk_latents} latents at a time, made for "
        f"{stream.width}x{stream.height} at {stream.fps:g} frames a second."
    )
    assert lines[-1] == f"Files: `{tiny_model}`"
    edit = "liveedit edit in.mp4 out.mp4 --prompt"
    assert f'{edit} "make it night" --model models:/m/1' in lines  # its card names no prompt
    first = lines.index("| a | 0.1235 |")
    assert lines[first + 1] == "| b | 2 |"
    assert [spec.shape for spec in signature(tiny_model).outputs] == [
        (-1, stream.height, stream.width, 3)
    ]


def test_a_card_in_words() -> None:
    card = {"a": "x" * 300, "b": "x" * 301, "c": [1.23456, "d"], "e": {"f": None, "g": True},
            "h": HASH, "i": f"of {COMMIT}", "j": "0123456789abcdef"}  # fmt: skip
    assert in_words(card) == {
        "a": "x" * 300, "c": "1.235, d", "e": "f null, g true", "h": "0123456789ab",
        "i": "of 0123456789ab", "j": "0123456789abcdef",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "small"), [((720, 90), (720, 90)), ((100, 50), (100, 50)), ((1440, 301), (720, 150))]
)
def test_a_picture_is_no_wider_than_its_column(
    size: tuple[int, int], small: tuple[int, int], tmp_path: Path
) -> None:
    file, folder = tmp_path / "a.jpg", tmp_path / "small"
    folder.mkdir()
    Image.new("RGB", size, "navy").save(file)
    made = preview(file, folder)
    assert made == folder / "a-small.png"
    with Image.open(made) as shown:
        assert shown.size == small
        assert np.abs(np.asarray(shown).astype(int) - (0, 0, 128)).max() < 4


def test_a_digest_is_the_beginning_of_a_hash(tiny_model: Path, tmp_path: Path) -> None:
    assert digest_of(tiny_model) == model_fingerprint(tiny_model)[:12]
    assert len(digest_of(tiny_model)) == 12
