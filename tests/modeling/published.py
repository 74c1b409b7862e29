"""Folders like those that Wan and diffusers publish, at tiny sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from modeling.config import TransformerConfig, VaeConfig
from modeling.diffusion.transformer import Transformer
from modeling.importing.text import _FROM_WAN, keep_encoder
from modeling.importing.vae import convert_diffusers_vae
from tests.modeling.text.test_text import write_tokenizer

State = dict[str, Tensor]
SIZES = TransformerConfig(
    dim=48, ffn_dim=80, num_heads=3, num_layers=2, freq_dim=32, text_dim=32, source_channels=0
)
HEADS_128 = replace(SIZES, dim=128, num_heads=1, source_channels=16)
VAE = VaeConfig("wan", base_dim=8)
TINY_VAE = VaeConfig("tiny", widths=(16, 12, 10, 8), mean=(0.0,) * 16, std=(1.0,) * 16)
UMT5 = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)


class Published(NamedTuple):
    """The same networks in two folders, as Wan and as diffusers publish them."""

    wan: Path
    diffusers: Path
    transformer: State
    vae: State
    text: State


def diffusers_name(name: str) -> str:
    """What diffusers calls the transformer's parameter `name`; written apart from the importer."""
    table = {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
        "modulation": "scale_shift_table",
        "norm3": "norm2",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
    }
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        table |= {f"{ours}.{x}": f"{theirs}.to_{x}" for x in "qkv"}
        table |= {f"{ours}.o": f"{theirs}.to_out.0"}
        table |= {f"{ours}.norm_{x}": f"{theirs}.norm_{x}" for x in "qk"}
    block, inner = "", name
    if name.startswith("blocks."):
        _, number, inner = name.split(".", 2)
        block = f"blocks.{number}."
    for ours, theirs in table.items():
        if inner == ours or inner.startswith(f"{ours}."):
            return block + theirs + inner.removeprefix(ours)
    return name


def wan_text_name(name: str) -> str:
    """What Wan calls the encoder's parameter `name`."""
    if name == "shared.weight":
        return "token_embedding.weight"
    if name == "encoder.final_layer_norm.weight":
        return "norm.weight"
    _, _, number, inner = name.removesuffix(".weight").split(".", 3)
    ours = {theirs: ours for ours, theirs in _FROM_WAN.items()}
    return f"blocks.{number}.{ours[inner]}.weight"


def publish(root: Path) -> Published:
    """Write both folders below `root`, with random weights."""
    torch.manual_seed(0)
    wan, diffusers = root / "wan", root / "diffusers"

    transformer = Transformer(SIZES).state_dict()
    transformer = {name: torch.randn_like(tensor) / 10 for name, tensor in transformer.items()}
    theirs = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=80,
        num_layers=2,
    )
    theirs.load_state_dict({diffusers_name(name): value for name, value in transformer.items()})
    theirs.save_pretrained(diffusers / "transformer", max_shard_size="100KB")
    assert len(list((diffusers / "transformer").glob("*.safetensors"))) > 1

    vae = AutoencoderKLWan(base_dim=8)
    vae.save_pretrained(diffusers / "vae")
    text = UMT5EncoderModel(UMT5)
    text.save_pretrained(diffusers / "text_encoder")
    write_tokenizer(diffusers / "tokenizer")
    (diffusers / "model_index.json").write_text('{"_class_name": "WanPipeline"}')

    wan.mkdir()
    save_file(transformer, wan / "diffusion_pytorch_model.safetensors")
    (wan / "config.json").write_text('{"_class_name": "WanModel", "num_heads": 3, "eps": 1e-06}')
    vae_state = convert_diffusers_vae(vae.state_dict(), VAE)
    torch.save(vae_state, wan / "Wan2.1_VAE.pth")
    text_state = keep_encoder(text.state_dict())
    torch.save(
        {wan_text_name(name): tensor for name, tensor in text_state.items()},
        wan / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    write_tokenizer(wan / "google" / "umt5-xxl")
    (wan / "README.md").write_text("not weights")
    return Published(wan, diffusers, transformer, vae_state, text_state)
