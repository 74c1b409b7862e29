"""Public transformer checkpoints in our names: Wan's own, diffusers', and training checkpoints.

Our names are those of the original Wan release. See docs/checkpoints.md for what comes from where.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modeling.config import TransformerConfig
from modeling.diffusion.transformer import Transformer
from modeling.importing.checkpoint_files import WeightsError, check_tensors

WAN_HEAD_DIM = 128  # every published Wan model

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")

# diffusers' names, piece by piece; the order matters where one holds another.
_FROM_DIFFUSERS = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".norm2.", ".norm3."),  # before cross-attention; diffusers counts in the order of use
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    ("proj_out.", "head.head."),
)


def pick_network(checkpoint: Mapping[str, Any], ema: bool) -> tuple[dict[str, Tensor], str | None]:
    """The generator of a training checkpoint, and which entry it is (None: a plain state dict).

    Published pipelines run `generator`; `ema` takes its moving average `generator_ema` instead.
    """
    entries = [name for name in ("generator", "generator_ema") if name in checkpoint]
    if not entries:
        if ema:
            raise WeightsError(
                "--ema: this checkpoint is one network, without generator_ema; leave --ema out"
            )
        return dict(checkpoint), None
    entry = "generator_ema" if ema else "generator"
    if entry not in entries:
        remedy = "leave --ema out" if ema else "add --ema"
        raise WeightsError(f"the checkpoint has {entries[0]} and no {entry}; {remedy}")
    if not isinstance(checkpoint[entry], Mapping):
        raise WeightsError(f"{entry} of the checkpoint holds no named tensors")
    return dict(checkpoint[entry]), entry


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what FSDP, activation checkpointing, DDP and torch.compile add to names."""
    return {_bare(name): tensor for name, tensor in state.items()}


def convert_diffusers_transformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' WanTransformer3DModel in Wan's names; unknown names stay as they are."""
    return {_from_diffusers(name): tensor for name, tensor in state.items()}


def infer_transformer(
    state: Mapping[str, Tensor], *, num_heads: int | None, eps: float = 1e-6
) -> TransformerConfig:
    """The sizes of a transformer in Wan's names; always with source channels.

    Shapes do not tell the number of heads: None means heads of 128, as in every published Wan.
    """
    patch = _need(state, "patch_embedding.weight", 5)
    dim, channels = patch.shape[0], patch.shape[1]
    latent = _need(state, "head.head.weight", 2).shape[0] // 4
    if channels not in (latent, 2 * latent):
        raise WeightsError(
            f"the patch embedding takes {channels} channels; a text-to-video model takes {latent} "
            f"and an editor {2 * latent} (36 is an image-to-video model, which cannot be imported)"
        )
    if num_heads is None:
        if dim % WAN_HEAD_DIM:
            raise WeightsError(
                f"width {dim} is no multiple of Wan's head size {WAN_HEAD_DIM}, and the weights do "
                "not tell the number of heads; name it with --preset, or keep the checkpoint's "
                "config.json beside it"
            )
        num_heads = dim // WAN_HEAD_DIM
    layers = {int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)}
    return TransformerConfig(
        dim=dim,
        ffn_dim=_need(state, "blocks.0.ffn.0.weight", 2).shape[0],
        num_heads=num_heads,
        num_layers=max(layers) + 1,
        freq_dim=_need(state, "time_embedding.0.weight", 2).shape[1],
        text_dim=_need(state, "text_embedding.0.weight", 2).shape[1],
        latent_channels=latent,
        source_channels=latent,
        eps=eps,
    )


def widen_patch_embedding(state: dict[str, Tensor], config: TransformerConfig) -> bool:
    """Give a network without source channels zeros for them, in place; whether it had none."""
    patch = state["patch_embedding.weight"]
    if patch.shape[1] != config.latent_channels:
        return False
    source = patch.new_zeros(patch.shape[0], config.source_channels, *patch.shape[2:])
    state["patch_embedding.weight"] = torch.cat([patch, source], dim=1)  # noisy channels first
    return True


def check_transformer(state: dict[str, Tensor], config: TransformerConfig, label: str) -> None:
    """Every tensor of `Transformer(config)` must be there, and no other."""
    with torch.device("meta"):
        wanted = Transformer(config).state_dict()
    remedy = "Only Wan2.1 text-to-video networks and editors made from them can be imported."
    check_tensors(state, wanted, label, remedy)


def _bare(name: str) -> str:
    name = _WRAPPERS.sub("", name)
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _from_diffusers(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    if name.endswith(".scale_shift_table"):
        return name.removesuffix("scale_shift_table") + "modulation"
    for theirs, ours in _FROM_DIFFUSERS:
        name = name.replace(theirs, ours)
    return name


def _need(state: Mapping[str, Tensor], name: str, dims: int) -> Tensor:
    tensor = state.get(name)
    if not isinstance(tensor, Tensor) or tensor.dim() != dims:
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        raise WeightsError(f"{name} is {found}, so the network's sizes are unknown")
    return tensor
