"""Transformer checkpoints: names, shapes and numbers against diffusers' WanTransformer3DModel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from modeling.config import TransformerConfig
from modeling.diffusion.attention import bidirectional
from modeling.diffusion.transformer import Transformer
from modeling.importing.checkpoint_files import WeightsError
from modeling.importing.transformer import (
    check_transformer,
    convert_diffusers_transformer,
    infer_transformer,
    pick_network,
    strip_wrappers,
    widen_patch_embedding,
)
from modeling.presets import PRESETS

REFERENCE = Path(__file__).parents[2] / "reference"
LATENTS = 4


def diffusers_model(in_channels: int = 16) -> WanTransformer3DModel:
    """Random in every tensor: fresh biases and norms are all alike and would hide a mix-up."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=16,
        text_dim=24,
        freq_dim=32,
        ffn_dim=80,
        num_layers=3,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def imported(state: dict[str, Tensor], num_heads: int = 3) -> Transformer:
    state = convert_diffusers_transformer(state)
    config = infer_transformer(state, num_heads=num_heads)
    widen_patch_embedding(state, config)
    check_transformer(state, config, "test")
    transformer = Transformer(config).eval()
    transformer.load_state_dict(state)
    return transformer


@pytest.fixture(scope="module")
def clip() -> dict[str, Tensor]:
    """Two clips; the second has a shorter text."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 512, 24, generator=generator)
    text[0, 9:], text[1, 4:] = 0, 0  # zero after the true length
    shape = (2, LATENTS, 16, 6, 10)
    return {
        "noisy": torch.randn(shape, generator=generator),
        "source": torch.randn(shape, generator=generator),
        "timestep": torch.tensor([937.0, 250.0]),
        "text": text,
    }


def diffusers_velocity(model: WanTransformer3DModel, clip: dict[str, Tensor]) -> Tensor:
    latents = clip["noisy"]
    if model.config.in_channels == 32:
        latents = torch.cat([latents, clip["source"]], dim=2)
    with torch.no_grad():
        return model(
            latents.transpose(1, 2).to(model.dtype),
            clip["timestep"],
            clip["text"].to(model.dtype),
            return_dict=False,
        )[0].transpose(1, 2)


def our_velocity(model: Transformer, clip: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(
            clip["noisy"], clip["source"], clip["timestep"], clip["text"], bidirectional(LATENTS)
        )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("in_channels", [16, 32])
def test_forward_equals_diffusers(clip: dict[str, Tensor], in_channels: int) -> None:
    theirs = diffusers_model(in_channels)
    ours = imported(theirs.state_dict())
    assert relative_error(our_velocity(ours, clip), diffusers_velocity(theirs, clip)) < 1e-5


def test_forward_in_bf16(clip: dict[str, Tensor]) -> None:
    theirs = diffusers_model(32)
    wanted = diffusers_velocity(theirs, clip)
    ours = imported(theirs.state_dict()).bfloat16()
    found = our_velocity(ours, clip)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, wanted) < 1e-2
    assert relative_error(found, diffusers_velocity(theirs.bfloat16(), clip)) < 1e-2


def test_a_widened_network_ignores_the_source(clip: dict[str, Tensor]) -> None:
    ours = imported(diffusers_model(16).state_dict())
    assert ours.patch_embedding.in_channels == 32
    other = clip | {"source": torch.randn_like(clip["source"]) * 10}
    assert torch.equal(our_velocity(ours, clip), our_velocity(ours, other))


@pytest.mark.parametrize(("preset", "heads", "layers"), [("wan-1.3b", 12, 30), ("wan-14b", 40, 40)])
def test_full_size_diffusers_names(preset: str, heads: int, layers: int) -> None:
    ffn = PRESETS[preset].transformer.ffn_dim
    with torch.device("meta"):
        theirs = WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=layers)
    state = convert_diffusers_transformer(theirs.state_dict())
    config = infer_transformer(state, num_heads=None)
    assert config == PRESETS[preset].transformer
    assert widen_patch_embedding(state, config)
    check_transformer(state, config, "test")


def test_full_size_original_names() -> None:
    shapes = json.loads((REFERENCE / "wan2.1_t2v_1.3b.keys.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = infer_transformer(state, num_heads=None)
    assert config == PRESETS["wan-1.3b"].transformer
    assert widen_patch_embedding(state, config)
    check_transformer(state, config, "test")
    assert sum(tensor.numel() for tensor in state.values()) == 1_419_095_104


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.{}",
        "module.{}",
        "model._fsdp_wrapped_module.{}",
        "_fsdp_wrapped_module.model.{}",
        "model._fsdp_wrapped_module._checkpoint_wrapped_module.{}",
        "_orig_mod.{}",
        "model.diffusion_model.{}",
    ],
)
def test_wrappers_are_stripped(wrapped: str) -> None:
    state = Transformer(
        TransformerConfig(dim=24, ffn_dim=32, num_heads=1, num_layers=2)
    ).state_dict()
    names = {
        wrapped.format(name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module.")): tensor
        for name, tensor in state.items()
    }
    stripped = strip_wrappers(names)
    assert stripped.keys() == state.keys()
    assert all(stripped[name] is tensor for name, tensor in state.items())


def test_every_difference_is_listed() -> None:
    config = TransformerConfig(dim=24, ffn_dim=32, num_heads=1, num_layers=2)
    state = Transformer(config).state_dict()
    for layer in range(2):
        del state[f"blocks.{layer}.ffn.2.bias"]
        state[f"blocks.{layer}.cross_attn.k_img.weight"] = torch.zeros(24, 24)
        state[f"blocks.{layer}.norm3.weight"] = torch.zeros(23)
    with pytest.raises(WeightsError) as error:
        check_transformer(state, config, "model.pth")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("model.pth: 6 tensors do not fit")
    for layer in range(2):
        assert f"  missing: blocks.{layer}.ffn.2.bias [24]" in lines
        assert f"  not known: blocks.{layer}.cross_attn.k_img.weight [24, 24]" in lines
        assert f"  wrong shape: blocks.{layer}.norm3.weight is [23], expected [24]" in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}, "36 is an image-to-video"),
        ({"patch_embedding.weight": torch.zeros(128, 48, 1, 2, 2)}, "takes 48 .* 16 .* editor 32"),
        ({"patch_embedding.weight": torch.zeros(100, 16, 1, 2, 2)}, "width 100 is no multiple"),
        ({"head.head.weight": torch.zeros(64)}, r"head\.head\.weight is of shape \[64\]"),
        ({"time_embedding.0.weight": None}, r"time_embedding\.0\.weight is missing"),
    ],
)
def test_sizes_that_cannot_be_told(change: dict[str, Tensor | None], message: str) -> None:
    config = TransformerConfig(dim=128, ffn_dim=32, num_heads=1, num_layers=1)
    state = {**Transformer(config).state_dict(), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(WeightsError, match=message):
        infer_transformer(state, num_heads=None)


def test_which_network_of_a_training_checkpoint() -> None:
    one, two, weight = torch.zeros(1), torch.ones(1), torch.ones(2)
    checkpoint = {"generator": {"a": one}, "generator_ema": {"a": two}, "critic": {"a": weight}}
    assert pick_network(checkpoint, ema=False) == ({"a": one}, "generator")
    assert pick_network(checkpoint, ema=True) == ({"a": two}, "generator_ema")
    assert pick_network({"a": one}, ema=False) == ({"a": one}, None)
    with pytest.raises(WeightsError, match="has generator and no generator_ema; leave --ema"):
        pick_network({"generator": {}}, ema=True)
    with pytest.raises(WeightsError, match="has generator_ema and no generator; add --ema"):
        pick_network({"generator_ema": {}}, ema=False)
    with pytest.raises(WeightsError, match="without generator_ema"):
        pick_network({"a": one}, ema=True)
    with pytest.raises(WeightsError, match="generator of the checkpoint holds no named"):
        pick_network({"generator": one}, ema=False)
