"""What an import says and takes from elsewhere, by hand, without weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from modeling.config import TextConfig
from modeling.importing import plan as plan_module
from modeling.importing.checkpoint_files import WeightFiles, WeightsError
from modeling.importing.parts import Part, PartKind, _settings
from modeling.importing.plan import (
    ImportPlan,
    _describe,
    _model_config,
    check_space,
    write_import,
)
from modeling.importing.text import find_tokenizer, infer_umt5, keep_encoder, write_text_folder
from modeling.importing.transformer import infer_transformer
from modeling.presets import PRESETS


def part(kind: PartKind, config: Any, files: tuple[Path, ...] = ()) -> Part:
    return Part(kind, "Wan", WeightFiles(Path("x"), files), {}, config)


@pytest.mark.parametrize("name", PRESETS)
def test_a_transformer_of_a_presets_sizes_gets_all_of_that_preset(name: str) -> None:
    """But for the words, which are UMT5's, of the size that it reads."""
    own = PRESETS[name]
    preset, config = _model_config({"transformer": part("transformer", own.transformer)})
    assert preset is not None
    assert PRESETS[preset].transformer == own.transformer
    text = TextConfig("umt5", dim=own.transformer.text_dim, tokens=512)
    assert config == replace(PRESETS[preset], text=text)


def test_a_transformer_of_other_sizes_streams_as_the_small_one() -> None:
    sizes = replace(PRESETS["wan-1.3b"].transformer, num_layers=7)
    preset, config = _model_config({"transformer": part("transformer", sizes)})
    assert (preset, config.transformer) == (None, sizes)
    assert (config.stream, config.vae) == (PRESETS["wan-1.3b"].stream, PRESETS["wan-1.3b"].vae)
    vae = replace(config.vae, base_dim=8)
    preset, config = _model_config({"vae": part("vae", vae)})
    assert (config.vae, config.transformer) == (vae, PRESETS["wan-1.3b"].transformer)


def test_a_card_says_every_file_and_progress_goes_over_all_of_them(tmp_path: Path) -> None:
    files = (tmp_path / "a.bin", tmp_path / "b.bin")
    for file, size in zip(files, (300, 20), strict=True):
        file.write_bytes(b"x" * size)
    told: list[tuple[int, int]] = []
    found = _describe(part("vae", None, files), lambda done, total: told.append((done, total)))
    assert found == {
        "layout": "Wan",
        "notes": [],
        "files": [
            {"name": file.name, "bytes": size, "sha256": hashlib.sha256(b"x" * size).hexdigest()}
            for file, size in zip(files, (300, 20), strict=True)
        ],
    }
    assert told == [(300, 320), (320, 320)]


@pytest.mark.parametrize(("room", "fits"), [(0, True), (-1, False)])
def test_a_disk_has_room_for_all_that_is_written(
    room: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the first byte is."""
    weights = {"w": torch.zeros(10_000, dtype=torch.float32)}
    made = ImportPlan(
        PRESETS["demo"], None, {"vae": replace(part("vae", PRESETS["demo"].vae), state=weights)},
        torch.bfloat16,
    )  # fmt: skip
    assert made.bytes_to_write == 20_000
    free = made.bytes_to_write + plan_module._ROOM + room
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda place: usage)
    if fits:
        check_space(tmp_path / "new", made.bytes_to_write)
        return
    with pytest.raises(WeightsError, match=r"takes 0\.0 GB and .* has 0\.1 GB free; make room"):
        write_import(made, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [".", "tokenizer", "../tokenizer", "google/umt5-xxl", "umt5-xxl"])
def test_a_tokenizer_lies_where_it_is_published(place: str, tmp_path: Path) -> None:
    """Or the weights' own folder has one, which goes before others'."""
    weights = tmp_path / "text" / "encoder.pth"
    folder = (weights.parent / place).resolve()
    folder.mkdir(parents=True)
    weights.parent.mkdir(exist_ok=True)
    with pytest.raises(WeightsError, match=f"no tokenizer.json near {weights}"):
        find_tokenizer(weights)
    (folder / "tokenizer.json").touch()
    assert find_tokenizer(weights) == folder
    (weights.parent / "tokenizer.json").touch()
    assert find_tokenizer(weights) == weights.parent


def test_of_a_whole_t5_the_encoder_is_kept_with_one_copy_of_the_words() -> None:
    words, again, block = torch.zeros(3, 2), torch.ones(3, 2), torch.ones(2, 2)
    state = {
        "encoder.embed_tokens.weight": again, "decoder.block.0.x": block, "lm_head.weight": again,
        "encoder.block.0.x": block,
    }  # fmt: skip
    assert keep_encoder(state) == {"shared.weight": again, "encoder.block.0.x": block}
    found = keep_encoder({"shared.weight": words, **state})
    assert found == {"shared.weight": words, "encoder.block.0.x": block}


def test_a_block_that_is_missing_is_missed() -> None:
    """Not taken for a shallower network."""
    state = {
        "patch_embedding.weight": torch.empty(128, 4, 1, 2, 2),
        "head.head.weight": torch.empty(16, 128),
        "blocks.0.ffn.0.weight": torch.empty(256, 128),
        "blocks.2.ffn.0.weight": torch.empty(256, 128),
        "time_embedding.0.weight": torch.empty(128, 32),
        "text_embedding.0.weight": torch.empty(128, 64),
    }
    found = infer_transformer(state, num_heads=None, eps=1e-5)
    assert (found.num_layers, found.num_heads, found.dim, found.ffn_dim) == (3, 1, 128, 256)
    assert (found.freq_dim, found.text_dim, found.eps) == (32, 64, 1e-5)
    assert (found.latent_channels, found.source_channels) == (4, 4)


def test_a_text_encoders_folder_has_all_of_a_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    published = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    published.add("spiece.model")
    for name in (*published, "README.md", "model.safetensors"):
        (tmp_path / name).write_text(name)
    write_text_folder(tmp_path / "to", {"shared.weight": torch.ones(2)}, {}, tmp_path)
    found = {path.name: path.read_text() for path in (tmp_path / "to" / "tokenizer").iterdir()}
    assert found == {name: name for name in published}


def test_the_sizes_of_a_text_encoder_are_read_off_its_shapes() -> None:
    """And a block that is missing is missed."""
    state = {
        "shared.weight": torch.empty(64, 32),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.empty(16, 4),
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.empty(24, 32),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": torch.empty(48, 32),
        "encoder.block.10.layer.1.DenseReluDense.wo.weight": torch.empty(32, 48),
    }
    found = infer_umt5(state)
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
    assert [found[name] for name in names] == [64, 32, 6, 48, 4, 11]
    assert found["relative_attention_num_buckets"] == 16
    for name in list(state)[:4]:
        without = {key: value for key, value in state.items() if key != name}
        with pytest.raises(WeightsError, match=rf"lacks '{name}'; it is no UMT5 encoder"):
            infer_umt5(without)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"_class_name": "WanModel", "eps": 1}', {"_class_name": "WanModel", "eps": 1}),
        ('{"_class_name": "Other", "eps": 1}', {}),
        ('{"eps": 1}', {}),
        ('["_class_name"]', {}),
        ("{", None),
    ],
)
def test_settings_beside_weights_are_believed_if_they_are_theirs(
    text: str, said: dict[str, Any] | None, tmp_path: Path
) -> None:
    weights, file = WeightFiles(tmp_path / "x.pt", ()), tmp_path / "config.json"
    assert _settings(weights, "_class_name", "Wan", "WanModel") == {}
    file.write_text(text)
    if said is not None:
        assert _settings(weights, "_class_name", "Wan", "WanModel") == said
        return
    with pytest.raises(WeightsError, match=f"{file} is no valid JSON"):
        _settings(weights, "_class_name", "WanModel")


def test_how_far_the_draft_of_a_model_has_grown_is_told_while_it_is_written(tmp_path: Path) -> None:
    """Of this model, and never more than the whole."""
    told: list[tuple[int, int]] = []
    heard = Event()

    def hear(done: int, total: int) -> None:
        told.append((done, total))
        heard.set()

    for name in (".one-abc/text/a.safetensors", ".one-abc/b.safetensors", "one-abc/c.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(20))
    with plan_module._watched(tmp_path / "one", hear, 100):
        heard.clear()
        assert heard.wait(10)
        with (tmp_path / ".one-abc" / "b.safetensors").open("ab") as file:
            file.write(bytes(70))
        heard.clear()
        assert heard.wait(10)
    assert list(dict.fromkeys(told)) == [(0, 100), (40, 100), (100, 100)]
