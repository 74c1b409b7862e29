"""Which networks a path holds, in which layout, and each of them in our names.

See docs/checkpoints.md for what can be imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modeling.config import VaeConfig
from modeling.importing.checkpoint_files import WeightFiles, WeightsError, find_weights
from modeling.importing.text import (
    check_umt5,
    convert_wan_umt5,
    find_tokenizer,
    infer_umt5,
    keep_encoder,
)
from modeling.importing.transformer import (
    check_transformer,
    convert_diffusers_transformer,
    infer_transformer,
    pick_network,
    strip_wrappers,
    widen_patch_embedding,
)
from modeling.importing.vae import convert_diffusers_vae, convert_taehv, convert_wan_vae
from modeling.model_dir import is_model_dir

PartKind = Literal["transformer", "vae", "text"]
NAMES: dict[PartKind, str] = {
    "transformer": "transformer",
    "vae": "video VAE",
    "text": "UMT5 text encoder",
}

# A layout is told by names that only it has. The first that fits wins.
_LAYOUTS: tuple[tuple[PartKind, str, str], ...] = (
    ("transformer", "training checkpoint", r"generator(_ema)?$"),
    ("transformer", "Wan", r"(.*\.)?blocks\.\d+\.(_\w+\.)*self_attn\."),
    ("transformer", "diffusers", r"(.*\.)?blocks\.\d+\.attn1\."),
    ("text", "Wan", r"blocks\.\d+\.attn\."),
    ("text", "transformers", r"encoder\.block\.\d+\."),
    ("vae", "Wan", r"(en|de)coder\.(down|up)samples\."),
    ("vae", "diffusers", r"(en|de)coder\.(down|up|mid)_block"),
    ("vae", "TAEHV", r"(en|de)coder\.\d+\."),
)
# Folders of a diffusers pipeline, beside the folder itself.
_SUBFOLDERS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class Network:
    """A network as it was found: recognised, not yet checked."""

    kind: PartKind
    layout: str
    weights: WeightFiles
    checkpoint: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A network in our names, every tensor checked."""

    kind: PartKind
    layout: str
    weights: WeightFiles
    state: dict[str, Tensor]
    config: Any  # TransformerConfig, VaeConfig, or what goes into a UMT5 config.json
    notes: list[str] = field(default_factory=list)
    tokenizer: Path | None = None  # of a text encoder

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.state.values())

    def bytes(self, dtype: torch.dtype | None) -> int:
        """Size of the weights in `dtype`, None being their own."""
        return sum(t.numel() * (dtype or t.dtype).itemsize for t in self.state.values())


def find_networks(path: Path) -> dict[PartKind, Network]:
    """The networks at `path`, a file or folder. None at all, or two of a kind, is an error."""
    if not path.exists():
        raise WeightsError(
            f"{path} does not exist; give a checkpoint's file or folder (docs/checkpoints.md)"
        )
    if path.is_dir() and is_model_dir(path):
        raise WeightsError(f"{path} is a model directory already; use it as it is")
    places = [path]
    if path.is_dir():
        places += [path / name for name in _SUBFOLDERS if (path / name).is_dir()]
    found: dict[PartKind, Network] = {}
    unknown = []
    for weights in [weights for place in places for weights in find_weights(place)]:
        checkpoint = weights.read()
        recognised = recognise(checkpoint)
        if recognised is None:
            unknown.append(f"{weights.name} (with {', '.join(list(checkpoint)[:3]) or 'nothing'})")
            continue
        kind, layout = recognised
        if kind in found:
            raise WeightsError(
                f"{path} holds more than one {NAMES[kind]}: {found[kind].weights.name} and "
                f"{weights.name}; give the path of the one you mean"
            )
        found[kind] = Network(kind, layout, weights, checkpoint)
    if not found:
        raise WeightsError(
            f"{path} holds no network that can be imported"
            + (f", only {', '.join(unknown)}" if unknown else ": there is no weight file")
            + "; docs/checkpoints.md lists what can be"
        )
    return found


def recognise(state: Mapping[str, Any]) -> tuple[PartKind, str] | None:
    """Kind and layout, told by the names alone."""
    for kind, layout, pattern in _LAYOUTS:
        if any(re.match(pattern, str(name)) for name in state):
            return kind, layout
    return None


def read_part(network: Network, *, ema: bool = False) -> Part:
    """Convert and check a network. `ema` prefers a training checkpoint's moving average."""
    if network.kind == "transformer":
        return _read_transformer(network, ema)
    return _read_vae(network) if network.kind == "vae" else _read_text(network)


def _read_transformer(network: Network, ema: bool) -> Part:
    weights, notes = network.weights, []
    picked, entry = pick_network(network.checkpoint, ema)
    if entry is not None:
        others = [name for name in network.checkpoint if name != entry]
        notes.append(f"took {entry}" + (f", not {', '.join(others)}" if others else ""))
    state = strip_wrappers(_tensors(picked, weights))
    if recognise(state) == ("transformer", "diffusers"):
        state = convert_diffusers_transformer(state)
    settings = _settings(weights, "_class_name", "WanModel", "WanTransformer3DModel")
    heads = settings.get("num_attention_heads", settings.get("num_heads"))
    config = infer_transformer(state, num_heads=heads, eps=settings.get("eps", 1e-6))
    widened = widen_patch_embedding(state, config)
    check_transformer(state, config, str(weights.name))
    if widened:
        notes.append(
            f"patch embedding widened with {config.source_channels} zero channels: it ignores the "
            "source video until it is trained to edit"
        )
    state = _one_dtype(state, notes)
    return Part("transformer", network.layout, weights, state, config, notes)


def _read_vae(network: Network) -> Part:
    weights, layout = network.weights, network.layout
    state, notes = _tensors(network.checkpoint, weights), list[str]()
    try:
        if layout == "TAEHV":
            config = VaeConfig("tiny", widths=_widths(state), mean=(0.0,) * 16, std=(1.0,) * 16)
            state = convert_taehv(state, config)
        elif layout == "diffusers":
            config = _wan_vae(state.get("encoder.conv_in.weight"))
            settings = _settings(weights, "_class_name", "AutoencoderKLWan")
            config = replace(
                config,
                mean=tuple(settings.get("latents_mean", config.mean)),
                std=tuple(settings.get("latents_std", config.std)),
            )
            state = convert_diffusers_vae(state, config)
        else:
            config = _wan_vae(state.get("encoder.conv1.weight"))
            state = convert_wan_vae(state, config)
    except ValueError as error:
        raise WeightsError(f"{weights.name}: {error}") from error
    return Part("vae", layout, weights, _one_dtype(state, notes), config, notes)


def _read_text(network: Network) -> Part:
    weights, notes = network.weights, list[str]()
    state = _tensors(network.checkpoint, weights)
    state = convert_wan_umt5(state) if network.layout == "Wan" else keep_encoder(state)
    config = infer_umt5(state)
    if network.layout == "transformers":
        published = _settings(weights, "model_type", "umt5")
        for name in ("layer_norm_epsilon", "relative_attention_max_distance", "feed_forward_proj"):
            config[name] = published.get(name, config[name])
    check_umt5(state, config, str(weights.name))
    state, tokenizer = _one_dtype(state, notes), find_tokenizer(weights.name)
    return Part("text", network.layout, weights, state, config, notes, tokenizer)


def _wan_vae(first: Tensor | None) -> VaeConfig:
    return VaeConfig("wan") if first is None else VaeConfig("wan", base_dim=first.shape[0])


def _widths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The decoder widths of a TAEHV; the published ones where a layer is missing."""
    layers = ("decoder.1", "decoder.8", "decoder.14", "decoder.20")
    known = zip(layers, VaeConfig("tiny").widths, strict=True)
    found = [(state.get(f"{layer}.weight"), width) for layer, width in known]
    return tuple(width if weight is None else weight.shape[0] for weight, width in found)


def _settings(weights: WeightFiles, mark: str, *values: str) -> dict[str, Any]:
    """The config.json beside the weights, if its `mark` is one of `values`; else it is not theirs.

    A single file may lie in a folder with the config.json of something else.
    """
    file = weights.name.parent / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f"{file} is no valid JSON ({error})") from error
    ours = isinstance(settings, dict) and settings.get(mark) in values
    return settings if ours else {}


def _tensors(state: Mapping[str, Any], weights: WeightFiles) -> dict[str, Tensor]:
    if others := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise WeightsError(
            f"{weights.name} has entries among its weights that are no tensors: {', '.join(others)}"
        )
    return dict(state)


def _one_dtype(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """All weights in float32 if they are of several types, since a network computes in one."""
    types = {str(t.dtype).removeprefix("torch.") for t in state.values()}
    if len(types) < 2:
        return state
    notes.append(f"weights of types {', '.join(sorted(types))} made float32")
    return {name: tensor.float() for name, tensor in state.items()}
