"""Converted public VAE weights give the public network's outputs, and only they are accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from modeling.config import VaeConfig
from modeling.importing.vae import (
    convert_diffusers_vae,
    convert_taehv,
    convert_wan_vae,
    diffusers_vae_name,
)
from modeling.vae.build import build_vae
from modeling.vae.streaming import StreamingVae

REFERENCE = Path(__file__).parents[2] / "reference"
SMALL = VaeConfig(kind="wan", base_dim=8)


def listed_shapes(file: str) -> dict[str, list[int]]:
    return json.loads((REFERENCE / file).read_text())


def meta_tensors(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKLWan, StreamingVae]:
    """diffusers' VAE with random weights and ours with the same, converted."""
    torch.manual_seed(4)
    theirs = AutoencoderKLWan(base_dim=8).requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        if name.endswith("gamma"):  # ones by default, which would hide a swap
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    ours = build_vae(SMALL).requires_grad_(False)
    ours.load_state_dict(convert_diffusers_vae(theirs.state_dict(), SMALL))
    return theirs, ours


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["f32", "bf16"]
)
def test_converted_weights_give_the_outputs_of_diffusers(
    pair: tuple[AutoencoderKLWan, StreamingVae], dtype: torch.dtype, tolerance: float
) -> None:
    theirs, ours = (model.to(dtype) for model in pair)
    generator = torch.Generator().manual_seed(5)
    pixels = (torch.rand(2, 17, 3, 32, 48, generator=generator) * 2 - 1).to(dtype)

    expected = theirs.encode(pixels.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
    raw, _ = ours.encode_raw(pixels)
    assert relative_error(raw, expected) <= tolerance

    latents = torch.randn(2, 5, 16, 4, 6, generator=generator).to(dtype)
    expected = theirs.decode(latents.transpose(1, 2)).sample.transpose(1, 2)
    decoded = ours.decode_raw(latents)[0].clamp(-1, 1)
    assert relative_error(decoded, expected) <= tolerance


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def test_full_size_names_are_those_of_the_public_checkpoints() -> None:
    listed = listed_shapes("wan2.1_vae.keys.json")
    with torch.device("meta"):
        theirs = AutoencoderKLWan().state_dict()
    converted = convert_diffusers_vae(theirs)
    assert {name: list(tensor.shape) for name, tensor in converted.items()} == listed
    assert convert_wan_vae(meta_tensors(listed)).keys() == listed.keys()
    assert {diffusers_vae_name(name) for name in listed} == theirs.keys()


def test_taehv_names_are_those_of_the_public_checkpoint() -> None:
    listed = listed_shapes("taew2_1.keys.json")
    assert convert_taehv(meta_tensors(listed)).keys() == listed.keys()


def test_every_difference_is_listed() -> None:
    shapes = listed_shapes("wan2.1_vae.keys.json")
    weights = meta_tensors({diffusers_vae_name(name): shape for name, shape in shapes.items()})
    del weights["quant_conv.bias"], weights["decoder.conv_in.weight"]
    weights["encoder.extra"] = torch.empty(3, device="meta")
    weights["encoder.conv_in.bias"] = torch.empty(97, device="meta")
    with pytest.raises(ValueError, match="4 of 194") as error:
        convert_diffusers_vae(weights)
    for line in (
        "missing quant_conv.bias [32]",
        "missing decoder.conv_in.weight [384, 16, 3, 3, 3]",
        "unknown encoder.extra [3]",
        "wrong shape encoder.conv_in.bias [97], expected [96]",
    ):
        assert line in str(error.value)


def test_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="not those of a TAEHV"):
        convert_taehv(meta_tensors(listed_shapes("wan2.1_vae.keys.json")))
