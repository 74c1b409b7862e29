"""Whatever of a model directory differs, its hash does, and its card does not count."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling import fingerprint
from modeling.config import TextConfig
from modeling.fingerprint import (
    FingerprintError,
    check_fingerprint,
    file_fingerprint,
    model_fingerprint,
)
from modeling.text import umt5
from modeling.text.umt5 import Umt5Encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    for name, text in (
        ("config.json", "{}"), ("card.json", "{}"), ("vae.safetensors", "v" * 50),
        ("transformer.safetensors", "t" * 50), ("text/tokenizer/a.json", "a"),
        ("text/text_encoder/b.json", "b"),
    ):  # fmt: skip
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(text)
    return made


def swap(one: Path, other: Path) -> None:
    one_text, other_text = one.read_text(), other.read_text()
    one.write_text(other_text)
    other.write_text(one_text)


DIFFERS: dict[str, Callable[[Path], object]] = {
    "a byte": lambda f: (f / "vae.safetensors").write_text("v" * 49 + "w"),
    "a size": lambda f: (f / "vae.safetensors").write_text("v" * 49),
    "a setting": lambda f: (f / "config.json").write_text("[]"),
    "a name": lambda f: (f / "vae.safetensors").rename(f / "vae2.safetensors"),
    "a file more": lambda f: (f / "z").write_text(""),
    "a file less": lambda f: (f / "vae.safetensors").unlink(),
    "a place": lambda f: (f / "text/tokenizer/a.json").rename(f / "text/text_encoder/a.json"),
    "a folder": lambda f: (f / "text/tokenizer").rename(f / "text/words"),
    "what is whose": lambda f: swap(f / "vae.safetensors", f / "transformer.safetensors"),
    "where a byte belongs": lambda f: swap(
        f / "text/tokenizer/a.json", f / "text/text_encoder/b.json"
    ),
}


@pytest.mark.parametrize("name", DIFFERS)
def test_what_differs_shows(folder: Path, name: str) -> None:
    before = model_fingerprint(folder)
    DIFFERS[name](folder)
    found = model_fingerprint(folder)
    assert found != before
    with pytest.raises(FingerprintError) as raised:
        check_fingerprint("m version 1", folder, before)
    for said in ("m version 1", str(folder), found[:12], before[:12]):
        assert said in str(raised.value)


def test_what_says_nothing_of_a_model_does_not(folder: Path, tmp_path: Path) -> None:
    """Its card, its age, and where it lies."""
    before = model_fingerprint(folder)
    (folder / "card.json").write_text('{"name": "another"}')
    os.utime(folder / "config.json", (1, 1))
    other = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (other / "card.json").unlink()
    for place in (folder, other, str(other)):
        assert model_fingerprint(place) == before
        check_fingerprint("m version 1", place, before)


BLOCK, MOST = 4, 4


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 15, 16])
def test_a_file_is_hashed_whole_up_to_a_size(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_BLOCK", BLOCK)
    monkeypatch.setattr(fingerprint, "_MAX_BLOCKS", MOST)
    assert different_bytes(tmp_path / "f", size, file_fingerprint) == list(range(size))


def test_that_size_is_256_mib_for_ever() -> None:
    """Registered models are known by their hashes: other blocks would make them others."""
    assert (fingerprint._BLOCK, fingerprint._MAX_BLOCKS) == (2**20, 256)
    assert (umt5._SAMPLES, umt5._SAMPLE_BYTES) == (256, 2**14)  # and text encoders


def test_of_a_larger_one_blocks_of_all_of_it_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_BLOCK", BLOCK)
    monkeypatch.setattr(fingerprint, "_MAX_BLOCKS", MOST)
    for size in (17, 32, 33):
        step = 2 if size <= 32 else 3
        assert different_bytes(tmp_path / "f", size, file_fingerprint) == [
            n for n in range(size) if n // BLOCK % step == 0
        ]


def test_text_encoders_are_hashed_from_the_first_byte_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(umt5, "_SAMPLES", MOST)
    monkeypatch.setattr(umt5, "_SAMPLE_BYTES", BLOCK)
    for size in (1, 16):
        assert different_bytes(tmp_path / "f", size, umt5._sample) == list(range(size))
    starts = [0, 7, 14, 21]  # evenly, the last to the end
    assert different_bytes(tmp_path / "f", 25, umt5._sample) == [
        n for start in starts for n in range(start, start + BLOCK)
    ]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A text encoder's folder, as far as its hash looks into it."""
    for name, text in (
        ("text_encoder/config.json", '{"d_model": 8}'), ("text_encoder/a.safetensors", "a"),
        ("text_encoder/b.bin", "b"), ("text_encoder/README.md", ""),
        ("tokenizer/tokenizer.json", "{}"), ("tokenizer/spiece.model", "s"),
        ("tokenizer/tokenizer_config.json", "{}"), ("tokenizer/README.md", ""),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def of_words(folder: Path, tokens: int = 4) -> str:
    return Umt5Encoder(TextConfig("umt5", dim=8, tokens=tokens, path=str(folder))).fingerprint()


def test_all_that_decides_an_embedding_shows_in_a_text_encoders_hash(words: Path) -> None:
    found = [of_words(words), of_words(words, tokens=5)]
    files = [path for path in words.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert len(files) == 6
    for file in files:
        before = file.read_text()
        file.write_text(before + " ")
        found.append(of_words(words))
        file.write_text(before)
    (words / "text_encoder/a.safetensors").rename(words / "text_encoder/c.safetensors")
    found.append(of_words(words))
    assert len(set(found)) == len(found) == 9
    (words / "text_encoder/c.safetensors").rename(words / "text_encoder/a.safetensors")
    for file in words.rglob("*.md"):
        file.write_text("more")
    assert of_words(words) == found[0]


def different_bytes(file: Path, size: int, hashed: Callable[[Path], object]) -> list[int]:
    """Those that change the hash of a file of so many."""
    file.write_bytes(bytes(size))
    before, found = hashed(file), []
    for n in range(size):
        file.write_bytes(bytes(n) + b"x" + bytes(size - n - 1))
        if hashed(file) != before:
            found.append(n)
    return found
