"""Public UMT5 text encoders as the folder that `modeling.text.build` loads.

text_encoder/  config.json, model.safetensors     transformers' names, encoder only
tokenizer/     tokenizer.json, ...                as published
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from modeling.importing.checkpoint_files import WeightsError, check_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
)
# Where published folders keep the tokenizer, seen from the weights.
_TOKENIZER_PLACES = (".", "tokenizer", "../tokenizer", "google/umt5-xxl", "umt5-xxl")

# Wan's names inside a block, and transformers'.
_FROM_WAN = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def convert_wan_umt5(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wan's `models_t5_umt5-xxl-enc-bf16.pth` in transformers' names; unknown names stay."""
    return {_from_wan(name): tensor for name, tensor in state.items()}


def keep_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformers checkpoint without its decoder, and with one copy of the word embeddings."""
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(("decoder.", "lm_head."))
    }
    tied = kept.pop("encoder.embed_tokens.weight", None)
    if tied is not None:
        kept.setdefault("shared.weight", tied)
    return kept


def infer_umt5(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `config.json` of an encoder in transformers' names, from its shapes."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    try:
        vocab, dim = state["shared.weight"].shape
        buckets, heads = state[f"{attention}.relative_attention_bias.weight"].shape
        inner = state[f"{attention}.q.weight"].shape[0]
        ffn_dim = state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(f"the text encoder lacks {error}; it is no UMT5 encoder") from error
    layers = {int(name.split(".")[2]) for name in state if name.startswith("encoder.block.")}
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocab,
        "d_model": dim,
        "d_kv": inner // heads,
        "d_ff": ffn_dim,
        "num_heads": heads,
        "num_layers": max(layers) + 1,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    }


def check_umt5(state: dict[str, Tensor], config: Mapping[str, Any], label: str) -> None:
    """Every tensor of transformers' UMT5EncoderModel must be there, and no other."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        wanted = UMT5EncoderModel(UMT5Config(**config)).state_dict()
    wanted.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight
    check_tensors(state, wanted, label, "Only UMT5 encoders can be imported.")


def find_tokenizer(weights: Path) -> Path:
    """The folder of the tokenizer that belongs to the weight file at `weights`."""
    places = [(weights.parent / place).resolve() for place in _TOKENIZER_PLACES]
    for place in places:
        if (place / "tokenizer.json").is_file():
            return place
    raise WeightsError(
        f"no tokenizer.json near {weights}; Wan keeps it in google/umt5-xxl/ and diffusers in "
        "tokenizer/ beside text_encoder/: put that folder there"
    )


def write_text_folder(
    target: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], tokenizer: Path
) -> None:
    """Write the layout of the module docstring to `target`, a new folder."""
    (target / "text_encoder").mkdir(parents=True)
    dtype = state["shared.weight"].dtype
    text = json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2)
    (target / "text_encoder" / "config.json").write_text(text + "\n")
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        target / "text_encoder" / "model.safetensors",
        metadata={"format": "pt"},  # transformers asks for it
    )
    (target / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, target / "tokenizer" / name)


def _from_wan(name: str) -> str:
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if found and found[2] in _FROM_WAN:
        return f"encoder.block.{found[1]}.{_FROM_WAN[found[2]]}.weight"
    return name
