"""The caches of a stream that sees frames at one size, empty."""

from __future__ import annotations

import torch

from modeling.config import MaskCacheConfig, StreamConfig
from modeling.diffusion.transformer import Transformer
from modeling.geometry import padded_latent_size
from modeling.streaming.kv_cache import KVCache
from modeling.streaming.mask_cache import MaskCache


def kv_cache(
    transformer: Transformer, settings: StreamConfig, work: tuple[int, int], device: torch.device
) -> KVCache:
    """`work` is height and width in pixels."""
    height, width = padded_latent_size(*work)
    return KVCache(
        transformer.config,
        batch=1,
        latent_height=height,
        latent_width=width,
        chunk_latents=settings.chunk_latents,
        window_latents=settings.window_latents,
        sink_latents=settings.sink_latents,
        window_positions=settings.window_positions,
        device=device,
        dtype=transformer.dtype,
    )


def mask_cache(
    config: MaskCacheConfig | None,
    transformer: Transformer,
    settings: StreamConfig,
    work: tuple[int, int],
    device: torch.device,
) -> MaskCache | None:
    """None where there is no `config`."""
    if config is None:
        return None
    height, width = padded_latent_size(*work)
    return MaskCache(
        config,
        transformer.config,
        chunk_latents=settings.chunk_latents,
        latent_height=height,
        latent_width=width,
        device=device,
        dtype=transformer.dtype,
    )
