"""Every refusal of a model directory, by lists of what may be wrong with one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.model_dir import ModelError, load_model, read_config, save_model
from tests.known_editors import CONFIG, write_known_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return write_known_model(tmp_path / "known")


ABSENT = object()


# A place in config.json, what is put there, and what the error must say.
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("format_version", 0, "has model format 0, this version reads 1"),
        ("format_version", 2, "has model format 2, this version reads 1"),
        ("format_version", ABSENT, "has model format None"),
        ("surprise", 1, r"config\.json has unknown keys surprise"),
        ("vae.surprise", 1, r"config\.json:vae has unknown keys surprise"),
        ("vae", ABSENT, "missing 1 required .*vae"),
        ("transformer.dim", ABSENT, "missing 1 required .*dim"),
        ("vae", [1], r"config\.json:vae must be an object, found \[1\]"),
        ("vae", None, r"config\.json:vae must be an object, found None"),
        ("vae.kind", "huge", "unknown VAE 'huge'; there are folded, tiny, wan"),
        ("text.kind", "huge", r"config\.json: unknown text encoder 'huge'; there are umt5, words"),
        ("stream.mask_cache.policy", "all", r"config\.json: unknown mask-cache policy 'all'"),
        ("vae.widths", 8, r"vae:widths must be a list, found 8"),
        ("vae.widths", [8, 8, 8, "8"], r"vae:widths must be int, found '8'"),
        ("vae.mean", [True] * 16, r"vae:mean must be float, found True"),
        ("stream.chunk_latents", "3", r"stream:chunk_latents must be int, found '3'"),
        ("stream.chunk_latents", 3.0, r"stream:chunk_latents must be int, found 3\.0"),
        ("stream.chunk_latents", True, r"stream:chunk_latents must be int, found True"),
        ("stream.chunk_latents", None, r"stream:chunk_latents must be int, found None"),
        ("stream.window_positions", 1, r"stream:window_positions must be bool, found 1"),
        ("stream.shift", "5", r"stream:shift must be float, found '5'"),
        ("stream.mask_cache", 1, r"stream:mask_cache must be an object, found 1"),
        ("stream.mask_cache.scope", "ffn", r"mask_cache:scope is 'ffn'"),
        ("stream.mask_cache.keep_ratio", 2.0, r"mask_cache: mask_cache\.keep_ratio 2\.0"),
        ("text.path", 3, r"text:path must be str, found 3"),
        ("text.dim", 64, r"text\.dim 64 does not fit"),
    ],
)
def test_a_wrong_config_is_named(saved: Path, place: str, value: Any, message: str) -> None:
    file = saved / "config.json"
    config = json.loads(file.read_text())
    *sections, name = place.split(".")
    inner = config
    for section in sections:
        inner = inner[section]
    if value is ABSENT:
        del inner[name]
    else:
        inner[name] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_model(saved)


def test_numbers_and_nothing_where_they_may_stand(saved: Path) -> None:
    file = saved / "config.json"
    config = json.loads(file.read_text())
    config["stream"] |= {"shift": 5, "mask_cache": None}
    config["text"]["path"] = None
    file.write_text(json.dumps(config))
    stream = read_config(saved).stream
    assert isinstance(stream.shift, float)
    assert stream.mask_cache is None
    assert asdict(read_config(saved))["text"] == {**config["text"], "path": None}


# A file of a model directory, what is written into it (None: it is taken away), and the error.
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"is no model directory: config\.json is missing"),
        ("config.json", b"{", r"config\.json is no valid JSON"),
        ("config.json", b"[]", r"config\.json must hold a JSON object"),
        ("card.json", None, r"is no model directory: card\.json is missing"),
        ("card.json", b"nonsense", r"card\.json is no valid JSON"),
        ("card.json", b"3", r"card\.json must hold a JSON object"),
        ("transformer.safetensors", b"", r"transformer\.safetensors is no readable safetensors"),
        ("vae.safetensors", b"x" * 100, r"vae\.safetensors is no readable safetensors"),
    ],
)
def test_damaged_files(saved: Path, name: str, content: bytes | None, message: str) -> None:
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(saved)


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("mistake", ["missing", "unexpected", "is [1], expected"])
def test_weights_that_do_not_fit(saved: Path, part: str, mistake: str) -> None:
    file = saved / f"{part}.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    if mistake == "unexpected":
        weights["more"] = torch.zeros(1)
        name = "more"
    elif mistake == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(1)
    save_file(weights, file)
    with pytest.raises(ModelError) as error:
        load_model(saved)
    assert f"{file} does not fit its config.json: " in str(error.value)
    assert f"{name} {mistake}" in str(error.value) or f"{mistake} {name}" in str(error.value)
    assert ";" not in str(error.value)  # nothing else


def test_where_models_are_not_written(saved: Path, tmp_path: Path) -> None:
    (saved / "transformer.safetensors").unlink()
    (saved / "vae.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds neither transformer\.safetensors nor vae"):
        load_model(saved)

    def write(path: Path) -> Path:
        return save_model(path, CONFIG, card={})

    for other in (b"mine", None):
        place = tmp_path / f"other-{other is None}"
        if other is None:
            place.mkdir()
            (place / "config.json").write_text('{"num_heads": 3}')  # another tool's
        else:
            place.write_bytes(other)
        with pytest.raises(ModelError, match="holds other files; give a new folder"):
            write(place)
        assert place.is_file() or (place / "config.json").is_file()
    (tmp_path / "empty").mkdir()
    assert (write(tmp_path / "empty") / "card.json").is_file()
    assert write(saved) == saved  # an older model
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_disk_that_fails_leaves_no_draft(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir()
        raise OSError("no space left")

    with pytest.raises(ModelError, match="could not be written: no space left"):
        save_model(tmp_path / "model", CONFIG, text=write, card={})
    assert not list(tmp_path.iterdir())
