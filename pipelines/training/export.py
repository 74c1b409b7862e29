"""What a stage made, and the model directory that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.config import VaeConfig
from modeling.model_dir import Model, load_model, save_model


@dataclass
class Exported:
    """A part that is None goes on as the start model has it."""

    transformer: dict[str, Tensor] | None = None
    vae: dict[str, Tensor] | None = None
    vae_config: VaeConfig | None = None
    card: dict[str, Any] = field(default_factory=dict)


def export_model(
    made: Exported,
    start: Model,
    output: Path,
    *,
    text: Path | None,
    dtype: torch.dtype,
    card: Mapping[str, Any],
) -> None:
    """Write the model directory: what was `made` of `start`, whose text encoder, if it brings one,
    is in the folder `text` (None: where it is, without a copy of its 11 GB); the transformer as
    `dtype`."""
    config = start.config
    if made.vae_config is not None:
        config = replace(config, vae=made.vae_config)
    if made.vae is not None:  # how much another VAE blurs has yet to be measured
        config = replace(config, stream=replace(config.stream, guide_blur=None))
    transformer = made.transformer
    if transformer is None and start.transformer is not None:
        transformer = start.transformer.state_dict()
    if transformer is not None:  # the VAE stays float32: it is small, and latents depend on it
        transformer = {name: value.to(dtype) for name, value in transformer.items()}
    save_model(
        output,
        config,
        transformer=transformer,
        vae=made.vae or start.vae,
        text=text if text and text.is_dir() else None,
        card={**card, **made.card},
    )


def copy_model(source: Path, output: Path, text: Path) -> None:
    """A model that was exported without its `text`, whole."""
    model = load_model(source)
    save_model(
        output,
        model.config,
        transformer=model.transformer,
        vae=model.vae,
        text=text if text.is_dir() else None,
        card=model.card,
    )
