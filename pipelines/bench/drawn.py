"""What a training is timed on: drawn weights and latents, in the files that training reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.sample import EncodedPair
from data.shards import write_dataset
from modeling.config import ModelConfig, TextConfig
from modeling.diffusion.transformer import Transformer
from modeling.geometry import SPATIAL_STRIDE, latents_of
from modeling.model_dir import save_model

SHARD = 4  # samples


def draw_model(folder: Path, config: ModelConfig, device: torch.device) -> None:
    """A model directory with a transformer alone, drawn on the device from seed 0.

    What Wan's initialisation leaves at zero (the head, the source channels) is drawn too: numbers
    that are zero draw less power, and a GPU is faster on them.
    """
    text = TextConfig(kind="words", dim=config.text.dim, tokens=config.text.tokens)
    devices = [device] if device.type == "cuda" else []  # by default it makes a context on all
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        transformer = Transformer(config.transformer)
        for weight in (transformer.head.head.weight, transformer.patch_embedding.weight):
            nn.init.normal_(weight, std=0.02)
    card = {"name": "drawn weights, for timing"}
    save_model(
        folder, replace(config, text=text), transformer=transformer, card=card, dtype=torch.bfloat16
    )


def draw_dataset(folder: Path, config: ModelConfig, frames: int, samples: int) -> None:
    """An encoded dataset of clips of so many pixel frames at the model's size."""
    size = (config.stream.height, config.stream.width)
    makers: list[Callable[[], EncodedPair]] = [
        partial(draw_pair, seed, frames, size, (config.text.tokens, config.text.dim))
        for seed in range(samples)
    ]
    write_dataset(folder, makers, made_by={"tool": "liveedit bench"}, samples_per_shard=SHARD)


def draw_pair(seed: int, frames: int, size: tuple[int, int], text: tuple[int, int]) -> EncodedPair:
    """`size` is height and width in pixels, `text` tokens and dimensions of the embedding."""
    rng = np.random.default_rng(seed)
    cells = (size[0] // SPATIAL_STRIDE, size[1] // SPATIAL_STRIDE)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    return EncodedPair(
        source=normal(latents_of(frames), 16, *cells),
        target=normal(latents_of(frames), 16, *cells),
        text=normal(*text),
        instruction="make it blue",
        fps=16.0,
        video_shape=(frames, *size),
    )
