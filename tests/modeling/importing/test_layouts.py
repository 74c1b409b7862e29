"""Whose network a file is, told by names as they are published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling.importing.checkpoint_files import WeightsError
from modeling.importing.parts import find_networks, recognise

KNOWN = [
    ("generator", "transformer", "training checkpoint"),
    ("generator_ema", "transformer", "training checkpoint"),
    ("blocks.0.self_attn.q.weight", "transformer", "Wan"),
    ("model.blocks.29.self_attn.norm_k.weight", "transformer", "Wan"),
    ("model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module.self_attn.o.bias",
     "transformer", "Wan"),
    ("blocks.0.attn1.to_q.weight", "transformer", "diffusers"),
    ("model.blocks.12.attn1.to_out.0.bias", "transformer", "diffusers"),
    ("blocks.0.attn.q.weight", "text", "Wan"),
    ("encoder.block.23.layer.0.SelfAttention.q.weight", "text", "transformers"),
    ("encoder.downsamples.0.residual.0.gamma", "vae", "Wan"),
    ("decoder.upsamples.3.resample.1.weight", "vae", "Wan"),
    ("encoder.down_blocks.0.conv1.weight", "vae", "diffusers"),
    ("decoder.up_blocks.1.resnets.0.conv1.weight", "vae", "diffusers"),
    ("encoder.mid_block.attentions.0.norm.gamma", "vae", "diffusers"),
    ("encoder.0.weight", "vae", "TAEHV"),
    ("decoder.22.bias", "vae", "TAEHV"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "layout"), KNOWN)
def test_a_layout_is_told_by_one_of_its_names(name: str, kind: str, layout: str) -> None:
    for names in ([name], ["other", name], [name, "other"]):
        assert recognise(dict.fromkeys(names)) == (kind, layout)


def test_names_that_are_like_one_are_none() -> None:
    names = ("generators", "my_generator_ema", "xblocks.0.self_attn.q", "blocks.x.self_attn.q")
    assert recognise(dict.fromkeys((*names, "encoder.block.layer", "encoderx.0.weight"))) is None


def test_every_layout_has_a_name_here() -> None:
    from modeling.importing.parts import _LAYOUTS

    assert {(kind, layout) for _, kind, layout in KNOWN} == {(k, n) for k, n, _ in _LAYOUTS}


def test_networks_are_found_beside_each_other_and_in_a_pipelines_folders(tmp_path: Path) -> None:
    def saved(place: str, name: str) -> Path:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: torch.ones(1)}, tmp_path / place)
        return tmp_path / place

    with pytest.raises(WeightsError, match=r"holds no network .*: there is no weight file"):
        find_networks(tmp_path)
    saved("notes.pt", "other")
    with pytest.raises(WeightsError, match=r"only .*notes\.pt \(with other\); docs"):
        find_networks(tmp_path)
    files = {
        "transformer": saved("transformer/a.pt", "blocks.0.attn1.to_q.weight"),
        "vae": saved("vae/b.pt", "decoder.up_blocks.1.x"),
        "text": saved("text_encoder/c.pt", "encoder.block.0.x"),
    }
    saved("scheduler/d.pt", "encoder.0.weight")  # no folder of a network
    assert {kind: n.weights.name for kind, n in find_networks(tmp_path).items()} == files
    second = saved("e.pt", "encoder.0.weight")
    with pytest.raises(WeightsError) as raised:
        find_networks(tmp_path)
    for said in ("more than one video VAE", str(second), str(files["vae"])):
        assert said in str(raised.value)
