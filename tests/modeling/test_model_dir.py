from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.config import MaskCacheConfig
from modeling.editor import StreamingEditor
from modeling.model_dir import ModelError, load_model, read_card, read_config, save_model
from modeling.presets import PRESETS


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = load_model("demo")
    config = model.config
    stream = replace(config.stream, mask_cache=MaskCacheConfig(keep_ratio=0.5))
    config = replace(config, stream=stream)
    path = tmp_path / "models" / "one"
    card = {"name": "one", "parent": None}
    return save_model(path, config, transformer=model.transformer, vae=model.vae, card=card)


def test_round_trip(saved: Path) -> None:
    original, loaded = load_model("demo"), load_model(saved)
    for part in ("transformer", "vae"):
        ours, theirs = getattr(loaded, part).state_dict(), getattr(original, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_config(saved).stream.mask_cache == MaskCacheConfig(keep_ratio=0.5)
    assert read_card(saved)["name"] == "one"
    assert [p.name for p in saved.parent.iterdir()] == ["one"]
    assert StreamingEditor.load(saved).mask_cache == MaskCacheConfig(keep_ratio=0.5)
    assert StreamingEditor.load(saved, mask_cache=None).mask_cache is None


def test_weights_can_be_stored_in_another_type(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved)
    half = save_model(
        tmp_path / "half",
        model.config,
        transformer=model.transformer,
        vae=model.vae,
        card={},
        dtype=torch.bfloat16,
    )
    size = sum(f.stat().st_size for f in half.iterdir())
    assert size < 0.6 * sum(f.stat().st_size for f in saved.iterdir())
    loaded = load_model(half, dtype=torch.float32).transformer
    assert loaded is not None
    assert loaded.dtype == torch.float32


def test_an_older_model_is_replaced_whole(saved: Path) -> None:
    save_model(saved, PRESETS["demo"], vae=load_model("demo").vae, card={"name": "two"})
    assert read_card(saved)["name"] == "two"
    assert not (saved / "transformer.safetensors").exists()
    assert [p.name for p in saved.parent.iterdir()] == ["one"]
    with pytest.raises(ModelError, match=r"no transformer\.safetensors, so it cannot edit"):
        StreamingEditor.load(saved)


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="holds other files"):
        save_model(tmp_path, PRESETS["demo"], card={})
    assert (tmp_path / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "model format 99, this version reads 1"),
        ({"surprise": 1}, "unknown keys surprise"),
        ({"vae": {"kind": "huge"}}, "unknown VAE 'huge'; there are tiny, wan"),
        ({"stream": {"height": 128, "width": 192, "chunk_latents": "3"}}, "must be int, found '3'"),
        ({"stream": {"height": 100, "width": 192}}, "not a multiple of 16"),
        ({"text": {"kind": "words", "dim": 65, "tokens": 24}}, "text.dim 65 does not fit"),
    ],
)
def test_a_wrong_config_is_named(saved: Path, change: dict[str, object], message: str) -> None:
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        load_model(saved)


def test_missing_and_damaged_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model directory: config\.json is missing"):
        load_model(tmp_path / "absent")
    weights = saved / "transformer.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"transformer\.safetensors is no readable safetensors"):
        load_model(saved)


def test_weights_that_do_not_fit_are_listed(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = saved / "transformer.safetensors"
    state = load_file(file)
    state["extra"] = state.pop("head.head.bias")
    state["head.head.weight"] = state["head.head.weight"][:5].contiguous()
    save_file(state, file)
    with pytest.raises(ModelError) as error:
        load_model(saved)
    for part in ("missing head.head.bias", "unexpected extra", "head.head.weight is [5, 192]"):
        assert part in str(error.value)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'wan-2b'; there are demo, wan-1\.3b"):
        PRESETS["wan-2b"]
