"""Public VAE checkpoints in other layouts, turned into the names and shapes of ours.

Our networks use the names of Wan's original `Wan2.1_VAE.pth` and of TAEHV's `taew2_1.pth`; only
the diffusers layout (`AutoencoderKLWan`) is renamed. Tensors are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from infra.runtime.errors import UserError
from modeling.config import VaeConfig
from modeling.vae.build import build_vae

_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
# Original pattern -> diffusers name, applied in this order to what is left of the name.
_RENAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def diffusers_vae_name(name: str) -> str:
    """What `AutoencoderKLWan` calls the parameter that Wan's original VAE calls `name`."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r"\.residual\.(\d)\.", lambda match: f".{_RESIDUAL[match[1]]}.", name)
    return re.sub(r"\.upsamples\.(\d+)\.", _up_block, name)


def _up_block(match: re.Match[str]) -> str:
    # The original counts layers through; a level is three residual blocks and an upsampler.
    level, place = divmod(int(match[1]), 4)
    layer = "upsamplers.0" if place == 3 else f"resnets.{place}"
    return f".up_blocks.{level}.{layer}."


def convert_diffusers_vae(
    state_dict: Mapping[str, Tensor], config: VaeConfig | None = None
) -> dict[str, Tensor]:
    """`AutoencoderKLWan` weights under the names of Wan's original VAE.

    `config` gives the sizes to expect (default: Wan2.1's). Raises ValueError that lists every
    missing, unknown and wrongly shaped tensor.
    """
    shapes = _shapes(config or VaeConfig(kind="wan"))
    originals = {diffusers_vae_name(name): name for name in shapes}
    expected = {name: shapes[original] for name, original in originals.items()}
    _check("a diffusers AutoencoderKLWan", state_dict, expected)
    return {originals[name]: tensor for name, tensor in state_dict.items()}


def convert_wan_vae(
    state_dict: Mapping[str, Tensor], config: VaeConfig | None = None
) -> dict[str, Tensor]:
    """Wan's original VAE weights, checked; errors as in `convert_diffusers_vae`."""
    _check("a Wan2.1 VAE", state_dict, _shapes(config or VaeConfig(kind="wan")))
    return dict(state_dict)


def convert_taehv(
    state_dict: Mapping[str, Tensor], config: VaeConfig | None = None
) -> dict[str, Tensor]:
    """TAEHV weights, checked against `config` (default: taew2_1); errors likewise.

    Latents of `taew2_1` are standardised as they are: its `VaeConfig` has mean 0 and std 1.
    """
    _check("a TAEHV", state_dict, _shapes(config or VaeConfig(kind="tiny")))
    return dict(state_dict)


def _shapes(config: VaeConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(t.shape) for name, t in build_vae(config).state_dict().items()}


def _check(what: str, state_dict: Mapping[str, Tensor], expected: Mapping[str, list[int]]) -> None:
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in state_dict]
    for name, tensor in state_dict.items():
        shape = list(tensor.shape)
        if name not in expected:
            problems.append(f"unknown {name} {shape}")
        elif shape != expected[name]:
            problems.append(f"wrong shape {name} {shape}, expected {expected[name]}")
    if problems:
        raise UserError(
            f"these weights are not those of {what} of the expected size; {len(problems)} of "
            f"{len(expected)} tensors differ:\n  " + "\n  ".join(problems)
        )
