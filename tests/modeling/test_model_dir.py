from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling.config import MaskCacheConfig
from modeling.editor import StreamingEditor
from modeling.fingerprint import model_fingerprint
from modeling.model_dir import (
    ModelError,
    latents_identity,
    load_model,
    read_card,
    read_config,
    save_model,
    set_guide,
)
from modeling.presets import PRESETS
from tests.known_editors import write_known_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = load_model("demo")
    config = model.config
    stream = replace(config.stream, mask_cache=MaskCacheConfig(keep_ratio=0.5))
    config = replace(config, stream=stream)
    path = tmp_path / "all" / "models" / "one"
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


def test_random_weights_are_always_the_same_and_drawn_from_nobody_elses_numbers() -> None:
    """A server's noise, or a training's, goes on as if no preset had been loaded in between."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = load_model("demo").transformer
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again = load_model("demo").transformer
    assert first is not None
    assert again is not None
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


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


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    """Who trains and who serves are different users."""
    (tmp_path / "words" / "deeper").mkdir(parents=True, mode=0o700)
    (tmp_path / "words" / "deeper" / "a.json").touch(0o600)
    model = load_model("demo")
    path = save_model(
        tmp_path / "one", model.config, transformer=model.transformer, vae=model.vae,
        text=tmp_path / "words", card={},
    )  # fmt: skip
    modes = {str(p.relative_to(path)): p.stat().st_mode & 0o777 for p in (path, *path.rglob("*"))}
    files = ("card.json", "config.json", "transformer.safetensors", "vae.safetensors")
    assert modes == {
        ".": 0o755, "text": 0o755, "text/deeper": 0o755, "text/deeper/a.json": 0o644,
        **dict.fromkeys(files, 0o644),
    }  # fmt: skip


def test_whole_numbers_stay_what_they_are(tmp_path: Path) -> None:
    state = {"a": torch.arange(300), "b": torch.ones(2), "c": torch.tensor([True, False])}
    path = save_model(
        tmp_path / "one", PRESETS["demo"], transformer=state, card={}, dtype=torch.bfloat16
    )
    found = load_file(path / "transformer.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": torch.int64, "b": torch.bfloat16, "c": torch.bool,
    }  # fmt: skip
    assert found["a"][-1] == 299


def test_an_older_model_is_there_until_the_new_one_is(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the new one cannot take its place."""
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == saved:
            raise OSError("as told")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    before = model_fingerprint(saved)
    with pytest.raises(ModelError, match="as told"):
        save_model(saved, PRESETS["demo"], vae=load_model("demo").vae, card={})
    (kept,) = saved.parent.rglob("transformer.safetensors")
    assert model_fingerprint(kept.parent) == before


def test_an_older_model_is_replaced_whole(saved: Path) -> None:
    save_model(saved, PRESETS["demo"], vae=load_model("demo").vae, card={"name": "two"})
    assert read_card(saved)["name"] == "two"
    assert not (saved / "transformer.safetensors").exists()
    assert [p.name for p in saved.parent.iterdir()] == ["one"]
    with pytest.raises(ModelError, match=r"no transformer\.safetensors, so it cannot edit"):
        StreamingEditor.load(saved)


def test_latents_mean_the_same_with_the_same_vae_numbers_and_history(saved: Path) -> None:
    config = read_config(saved)
    same = latents_identity(saved, config)
    assert latents_identity(saved, replace(config, stream=replace(config.stream, fps=7))) == same
    others = [replace(config, vae=replace(config.vae, std=(2.0,) * 16))]
    for name, value in (("chunk_latents", 1), ("window_latents", 18), ("sink_latents", 6)):
        others.append(replace(config, stream=replace(config.stream, **{name: value})))
    found = {latents_identity(saved, other) for other in others}
    file = saved / "vae.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    found.add(latents_identity(saved, config))
    assert len(found - {same}) == 5


def test_a_guide_is_recorded_and_nothing_else_changes(saved: Path) -> None:
    before, files = read_config(saved), sorted(saved.iterdir())
    fingerprint = model_fingerprint(saved)
    assert before.stream.guide_blur is None
    assert "guide_blur" not in (saved / "config.json").read_text()  # its fingerprint of before
    set_guide(saved, 0.4, {"loss_db": 0.5})
    assert read_config(saved) == replace(before, stream=replace(before.stream, guide_blur=0.4))
    assert read_card(saved) == {"name": "one", "parent": None, "guide": {"loss_db": 0.5}}
    assert model_fingerprint(saved) != fingerprint
    for wrong in (1.6, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"guide_blur .* is outside 0 to 1.5 pixels; .* null"):
            set_guide(saved, wrong, {})
    assert read_config(saved).stream.guide_blur == 0.4
    set_guide(saved, None, {})
    assert model_fingerprint(saved) == fingerprint
    assert sorted(saved.iterdir()) == files


def test_a_guide_is_there_before_its_figures_are(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that claims one stands beside nothing else, wherever the writing ends."""
    rename = Path.replace

    def fails(self: Path, target: Path) -> Path:
        if target.name == "card.json":
            raise OSError("as told")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(ModelError, match=f"the guide of {saved} could not be recorded: as told"):
        set_guide(saved, 0.4, {"loss_db": 0.5})
    assert read_config(saved).stream.guide_blur == 0.4
    assert "guide" not in read_card(saved)


def test_a_folder_goes_before_a_preset_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_model("demo").path is None
    write_known_model(Path("demo"))
    found = load_model("demo")
    assert (found.path, found.config) == (Path("demo"), read_config("demo"))
