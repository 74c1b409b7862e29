"""Public layouts, built here at tiny sizes, become model directories that edit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel, UMT5ForConditionalGeneration

from modeling.diffusion.transformer import Transformer
from modeling.editor import StreamingEditor
from modeling.importing import plan as importers
from modeling.importing.checkpoint_files import WeightsError
from modeling.importing.plan import plan_import, write_import
from modeling.importing.text import keep_encoder
from modeling.model_dir import load_model, read_card, read_config
from modeling.presets import PRESETS
from modeling.vae.build import build_vae
from tests.modeling.published import (
    HEADS_128,
    SIZES,
    TINY_VAE,
    UMT5,
    VAE,
    Published,
    State,
    publish,
)
from tests.modeling.text.test_text import write_tokenizer


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("published"))


def do_import(path: Path, to: Path, **options: Any) -> Path:
    return write_import(plan_import(path, **options), to)


def check_transformer(state: State, original: State) -> None:
    """`state` is `original` with zeros for the source."""
    assert state.keys() == original.keys()
    for name in original:
        if name == "patch_embedding.weight" and original[name].shape[1] == 16:
            assert torch.equal(state[name][:, :16], original[name])
            assert state[name].shape[1] == 32
            assert not state[name][:, 16:].any()
        else:
            assert torch.equal(state[name], original[name]), name


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_whole_folder(published: Published, tmp_path: Path, layout: str) -> None:
    folder = getattr(published, layout)
    to = do_import(folder, tmp_path / "models" / "one")
    config = read_config(to)
    assert config.transformer == replace(SIZES, source_channels=16)
    assert config.vae == VAE
    assert (config.text.kind, config.text.dim, config.text.tokens) == ("umt5", 32, 512)
    assert config.text.path == str(to / "text")
    check_transformer(load_file(to / "transformer.safetensors"), published.transformer)
    vae = load_file(to / "vae.safetensors")
    assert vae.keys() == published.vae.keys()
    assert all(torch.equal(vae[name], published.vae[name]) for name in vae)
    text = load_file(to / "text" / "text_encoder" / "model.safetensors")
    assert text.keys() == published.text.keys()
    assert all(torch.equal(text[name], published.text[name]) for name in text)

    editor = StreamingEditor.load(to)
    stream = editor.open("make the sky red", height=32, width=32)
    chunks = list(stream.push(np.full((9, 32, 32, 3), 128, np.uint8)))
    assert chunks[0].frames.shape == (9, 32, 32, 3)
    assert sorted(p.name for p in to.parent.iterdir()) == ["one"]


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [("wan-1.3b", ["832x480"]), ("wan-14b", ["832x480", "1280x720"])],
)
def test_the_card_says_the_sizes_that_wan_was_trained_at(
    published: Published, tmp_path: Path, preset: str, sizes: list[str]
) -> None:
    plan = replace(plan_import(published.wan), preset=preset)  # the weights stay small
    card = read_card(write_import(plan, tmp_path / "one"))
    assert (card["preset"], card["trained_at"]) == (preset, sizes)


def test_the_card_says_where_each_part_is_from(published: Published, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    plan = plan_import(published.wan)
    assert not plan.is_editor
    to = write_import(plan, tmp_path / "one", on_progress=lambda *news: heard.append(news))
    card = read_card(to)
    origin = card["imported_from"]
    assert (card["name"], card["preset"], card["parent"]) == ("one", None, None)
    assert "trained_at" not in card  # not one of Wan's sizes
    assert [origin[part]["layout"] for part in ("transformer", "vae", "text")] == ["Wan"] * 3
    for part, name in (("vae", "Wan2.1_VAE.pth"), ("text", "models_t5_umt5-xxl-enc-bf16.pth")):
        content = (published.wan / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert origin[part]["files"] == [{"name": name, "bytes": len(content), "sha256": digest}]
    assert "ignores the source video" in origin["transformer"]["notes"][0]
    for task in (
        "hashing transformer",
        "hashing video VAE",
        "hashing UMT5 text encoder",
        "writing",
    ):
        assert [done == total for name, done, total in heard if name == task][-1]
    assert {p.stat().st_mode & 0o777 for p in to.rglob("*") if p.is_file()} == {0o644}
    weights = sum(p.stat().st_size for p in to.rglob("*.safetensors"))
    assert 0.8 < plan.bytes_to_write / weights < 1


def test_what_only_a_config_says_is_taken_from_it(published: Published, tmp_path: Path) -> None:
    folder = shutil.copytree(published.diffusers, tmp_path / "theirs")
    mean, std = [n / 10 for n in range(16)], [1 + n / 10 for n in range(16)]
    said: dict[str, dict[str, Any]] = {
        "vae": {"latents_mean": mean, "latents_std": std},
        "transformer": {"eps": 1e-5},
        "text_encoder": {
            "layer_norm_epsilon": 1e-4,
            "relative_attention_max_distance": 64,
            "feed_forward_proj": "gated-silu",
        },
    }
    for part, values in said.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    to = do_import(folder, tmp_path / "one")
    config = read_config(to)
    assert (config.vae.mean, config.vae.std) == (tuple(mean), tuple(std))
    assert config.transformer.eps == 1e-5
    text = json.loads((to / "text" / "text_encoder" / "config.json").read_text())
    assert said["text_encoder"].items() <= text.items()


def test_parts_from_several_places(published: Published, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tiny = build_vae(TINY_VAE).state_dict()
    torch.save(tiny, tmp_path / "taew2_1.pth")
    only = shutil.copytree(published.diffusers / "transformer", tmp_path / "transformer")
    to = do_import(
        only,
        tmp_path / "one",
        vae=tmp_path / "taew2_1.pth",
        text=published.wan / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    assert read_config(to).vae == TINY_VAE
    saved = load_file(to / "vae.safetensors")
    assert all(torch.equal(saved[name], tiny[name]) for name in tiny)
    assert (to / "text" / "tokenizer" / "tokenizer.json").is_file()
    # --vae goes before what the path itself holds
    other = do_import(published.diffusers, tmp_path / "two", vae=tmp_path / "taew2_1.pth")
    assert read_config(other).vae == TINY_VAE


def test_a_transformer_alone_and_a_vae_alone(published: Published, tmp_path: Path) -> None:
    to = do_import(published.wan / "diffusion_pytorch_model.safetensors", tmp_path / "one")
    model = load_model(to)
    assert model.transformer is not None
    assert model.vae is None
    to = do_import(published.diffusers / "vae", tmp_path / "two")
    model = load_model(to)
    assert model.transformer is None
    assert model.config.vae == VAE
    assert model.config.transformer == PRESETS["wan-1.3b"].transformer


def training_checkpoint(wrap: Callable[[str], str]) -> tuple[dict[str, Any], State, State]:
    """A file like LiveEdit's and Self-Forcing's: bf16 and float32 mixed, names wrapped by FSDP."""
    torch.manual_seed(2)
    plain, average = (Transformer(HEADS_128).state_dict() for _ in range(2))
    for state in (plain, average):
        for name in state:
            state[name] = torch.randn_like(state[name])
            if "blocks.1" in name:
                state[name] = state[name].bfloat16()
    checkpoint = {
        "generator": {wrap(name): tensor for name, tensor in plain.items()},
        "generator_ema": {f"model.{name}": tensor for name, tensor in average.items()},
        "critic": {wrap(name): tensor for name, tensor in average.items()},
        "step": 2000,
    }
    return checkpoint, plain, average


def test_training_checkpoints(tmp_path: Path) -> None:
    def wrap(name: str) -> str:
        name = name.replace(
            "blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."
        )
        return f"model._fsdp_wrapped_module.{name}"

    checkpoint, plain, average = training_checkpoint(wrap)
    file = tmp_path / "ar-forcing_002000.pt"
    torch.save(checkpoint, file)
    # Something else's config.json in the same downloads folder must not be believed.
    (tmp_path / "config.json").write_text('{"num_heads": 7, "eps": 1}')
    for ema, wanted, entry in ((False, plain, "generator"), (True, average, "generator_ema")):
        to = do_import(file, tmp_path / entry, ema=ema)
        assert read_config(to).transformer == HEADS_128
        saved = load_file(to / "transformer.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        check_transformer(saved, {name: tensor.float() for name, tensor in wanted.items()})
        notes = read_card(to)["imported_from"]["transformer"]["notes"]
        assert notes[0].startswith(f"took {entry}, not generator")
        assert plan_import(file, ema=ema).is_editor
        assert notes[1] == "weights of types bfloat16, float32 made float32"
        assert load_model(to).transformer is not None


def test_weights_can_be_halved(published: Published, tmp_path: Path) -> None:
    plan = plan_import(published.wan, dtype=torch.bfloat16)
    assert 2 * plan.bytes_to_write == plan_import(published.wan).bytes_to_write
    to = write_import(plan, tmp_path / "one")
    for file in to.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    config = json.loads((to / "text" / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("full", [True, False])
def test_transformers_folders(published: Published, tmp_path: Path, full: bool) -> None:
    """google/umt5-xxl is encoder and decoder in one pickle, with the tokenizer beside."""
    torch.manual_seed(3)
    kind = UMT5ForConditionalGeneration if full else UMT5EncoderModel
    folder = tmp_path / "umt5-xxl"
    model = kind(UMT5)
    model.save_pretrained(folder)
    if full:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    write_tokenizer(folder)
    to = do_import(published.wan, tmp_path / "one", text=folder)
    saved = load_file(to / "text" / "text_encoder" / "model.safetensors")
    wanted = keep_encoder(model.state_dict())
    assert saved.keys() == wanted.keys() == published.text.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


class TestRefusals:
    """Each leaves nothing behind."""

    @pytest.fixture(autouse=True)
    def nothing_written(self, tmp_path: Path) -> Any:
        yield
        assert not (tmp_path / "to").exists()
        assert not list(tmp_path.glob(".to*"))

    def refuse(self, message: str, path: Path, tmp_path: Path, **options: Any) -> str:
        with pytest.raises(WeightsError, match=message) as error:
            do_import(path, tmp_path / "to", **options)
        return str(error.value)

    def test_differences_are_listed_in_full(self, published: Published, tmp_path: Path) -> None:
        state = dict(published.transformer)
        del state["blocks.0.norm3.bias"], state["head.modulation"]
        state["blocks.1.ffn.0.bias"] = torch.zeros(3)
        state["img_emb.proj.weight"] = torch.zeros(2, 2)
        file = tmp_path / "t.safetensors"
        save_file(state, file)
        shutil.copy(published.wan / "config.json", tmp_path)
        text = self.refuse("4 tensors do not fit", file, tmp_path)
        assert str(file) in text
        for line in (
            "missing: blocks.0.norm3.bias [48]",
            "missing: head.modulation [1, 2, 48]",
            "not known: img_emb.proj.weight [2, 2]",
            "wrong shape: blocks.1.ffn.0.bias is [3], expected [80]",
        ):
            assert f"  {line}" in text.splitlines()

    def test_incomplete_vae_and_text(self, published: Published, tmp_path: Path) -> None:
        state = dict(published.vae)
        del state["conv1.bias"]
        torch.save(state, tmp_path / "Wan2.1_VAE.pth")
        self.refuse(
            r"missing conv1\.bias", published.wan, tmp_path, vae=tmp_path / "Wan2.1_VAE.pth"
        )
        folder = shutil.copytree(published.diffusers, tmp_path / "text")
        text = dict(published.text)
        del text["encoder.final_layer_norm.weight"]
        save_file(text, folder / "text_encoder" / "model.safetensors")
        self.refuse(
            r"missing: encoder\.final_layer_norm\.weight", published.wan, tmp_path, text=folder
        )

    def test_no_tokenizer(self, published: Published, tmp_path: Path) -> None:
        file = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
        shutil.copy(published.wan / file.name, file)
        self.refuse(r"no tokenizer\.json near", published.wan, tmp_path, text=file)

    def test_nothing_known(self, published: Published, tmp_path: Path) -> None:
        self.refuse("does not exist", tmp_path / "absent", tmp_path)
        (tmp_path / "empty").mkdir()
        self.refuse("there is no weight file", tmp_path / "empty", tmp_path)
        torch.save({"bert.weight": torch.ones(1)}, tmp_path / "bert.pt")
        self.refuse(r"only .*bert\.pt \(with bert\.weight\)", tmp_path / "bert.pt", tmp_path)
        text = published.wan / "models_t5_umt5-xxl-enc-bf16.pth"
        message = f"--vae {text} holds no video VAE, but a UMT5 text encoder"
        self.refuse(message, published.wan, tmp_path, vae=text)

    def test_two_of_a_kind(self, published: Published, tmp_path: Path) -> None:
        folder = shutil.copytree(published.wan, tmp_path / "wan")
        shutil.copy(folder / "Wan2.1_VAE.pth", folder / "other_vae.pth")
        text = self.refuse("more than one video VAE", folder, tmp_path)
        assert "Wan2.1_VAE.pth" in text
        assert "other_vae.pth" in text

    def test_parts_that_do_not_fit_each_other(self, published: Published, tmp_path: Path) -> None:
        folder = tmp_path / "text"
        sizes = UMT5.to_dict() | {"d_model": 40}
        UMT5EncoderModel(UMT5Config(**sizes)).save_pretrained(folder / "text_encoder")
        write_tokenizer(folder / "tokenizer")
        self.refuse(
            "parts do not fit each other: text.dim 40", published.wan, tmp_path, text=folder
        )

    def test_ema_where_there_is_none(self, published: Published, tmp_path: Path) -> None:
        self.refuse("without generator_ema", published.wan, tmp_path, ema=True)
        self.refuse("holds no transformer", published.diffusers / "vae", tmp_path, ema=True)

    def test_entries_that_are_no_tensors(self, published: Published, tmp_path: Path) -> None:
        torch.save({**published.vae, "epoch": 3}, tmp_path / "vae.pth")
        self.refuse("are no tensors: epoch", tmp_path / "vae.pth", tmp_path)

    def test_a_full_disk(
        self, published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
        monkeypatch.setattr(importers.shutil, "disk_usage", lambda place: usage)
        self.refuse(r"takes 0\.0 GB and .* has 0\.0 GB free", published.wan, tmp_path)


def test_a_disk_needs_room_for_the_weights_and_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 10**9
    for free in (needed + importers._ROOM, needed + importers._ROOM - 1):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        asked: dict[Path, Any] = {tmp_path: usage}  # the nearest folder that is there
        monkeypatch.setattr(importers.shutil, "disk_usage", asked.__getitem__)
        if free >= needed + importers._ROOM:
            importers.check_space(tmp_path / "of" / "to", needed)
        else:
            with pytest.raises(WeightsError, match=r"takes 1\.0 GB and .* has 1\.1 GB free"):
                importers.check_space(tmp_path / "of" / "to", needed)


def test_what_is_there_is_kept(published: Published, tmp_path: Path) -> None:
    plan = plan_import(published.diffusers / "vae")
    with pytest.raises(WeightsError, match="holds something else"):
        # It has a config.json, but is not ours to replace.
        write_import(plan, published.wan, overwrite=True)
    assert (published.wan / "Wan2.1_VAE.pth").is_file()
    write_import(plan, tmp_path / "to")
    with pytest.raises(WeightsError, match="is a model already; add --overwrite"):
        write_import(plan, tmp_path / "to")
    write_import(plan, tmp_path / "to", overwrite=True)
    with pytest.raises(WeightsError, match="is a model directory already; use it as it is"):
        plan_import(tmp_path / "to")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(WeightsError, match="holds something else"):
        write_import(plan, file)
