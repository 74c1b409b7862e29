"""A model directory that edits in milliseconds: the demo's shape with less of everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modeling.diffusion.transformer import Transformer
from modeling.model_dir import save_model
from modeling.presets import PRESETS
from modeling.vae.build import build_vae


def save_small_model(path: Path, card: dict[str, Any] | None = None, **stream: int) -> Path:
    """Random weights, from seed 0, for frames of 48x32."""
    demo = PRESETS["demo"]
    config = replace(
        demo,
        transformer=replace(demo.transformer, dim=48, ffn_dim=64, num_heads=2, num_layers=2),
        vae=replace(demo.vae, widths=(16, 16, 8, 8)),
        stream=replace(demo.stream, height=32, width=48, **stream),
    )
    torch.manual_seed(0)
    transformer, vae = Transformer(config.transformer), build_vae(config.vae)
    with torch.no_grad():  # a new transformer's last layer is zero, which would edit nothing
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        last = list(vae.decoder.children())[-1]
        last.weight.mul_(20)  # a random decoder is nearly black: bring it into the visible range
        last.bias.fill_(0.5)
    return save_model(
        path, config, transformer=transformer, vae=vae, card=card or {"name": "small"}
    )
