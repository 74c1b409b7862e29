"""Compiling an editor's kernels before its first stream needs them, side by side.

Triton compiles a kernel at its first launch, one after the other: most of what the first chunk of a
process without a kernel cache waited for. A kernel's text depends on widths and not on sizes, so
the smallest picture makes all of them. Compilers run in processes and threads of their own, so the
networks that need them are rehearsed at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from modeling.diffusion.reuse import Reuse
from modeling.diffusion.rope import time_shift
from modeling.diffusion.transformer import Transformer
from modeling.geometry import SPATIAL_STRIDE
from modeling.gpu.kernels.guide import following
from modeling.gpu.kernels.heads import merge_attention, turn
from modeling.gpu.kernels.resize import resize
from modeling.gpu.kernels.transfer import transfer
from modeling.gpu.transformer import FusedTransformer
from modeling.streaming.kv_cache import KVCache
from modeling.vae.streaming import StreamingVae

_SIDE = 4  # latent cells of the smallest picture: 2 x 2 tokens


def rehearse(transformer: Transformer, fused: FusedTransformer, vae: StreamingVae) -> None:
    """Run each part of an editor once, at the smallest size and beside the others."""
    works, device = parts(transformer, fused, vae), transformer.patch_embedding.weight.device

    def here(work: Callable[[], None]) -> None:  # a thread begins on the first GPU, with gradients
        with torch.cuda.device(device), torch.no_grad():
            work()

    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(here, work) for work in works]:
            done.result()
    torch.cuda.synchronize(device)


def parts(
    transformer: Transformer, fused: FusedTransformer, vae: StreamingVae
) -> list[Callable[[], None]]:
    """What launches between them every kernel that a stream launches."""
    weight, config = transformer.patch_embedding.weight, transformer.config
    device, dtype = weight.device, weight.dtype
    zeros = partial(torch.zeros, device=device)

    def encode() -> None:
        vae.encode(zeros(1, 5, 3, SPATIAL_STRIDE * _SIDE, SPATIAL_STRIDE * _SIDE))

    def decode() -> None:
        vae.decode(zeros(1, 4, vae.config.latent_channels, _SIDE, _SIDE))

    def denoise() -> None:
        cache = KVCache(
            config, batch=1, latent_height=_SIDE, latent_width=_SIDE, chunk_latents=1,
            window_latents=1, device=device, dtype=dtype,
        )  # fmt: skip
        text = transformer.prepare_text(zeros(1, config.text_tokens, config.text_dim, dtype=dtype))
        latents = zeros(1, 1, config.latent_channels, _SIDE, _SIDE)
        source = latents if config.source_channels else None
        some = Reuse("block", zeros(0), torch.arange(2, device=device), fixed_size=True)
        for reuse in (None, some):
            fused(latents, source, zeros(1), text, cache, reuse)

    def attend() -> None:
        keys = zeros(1, 1, _SIDE, config.num_heads, config.head_dim, dtype=dtype)
        turn(keys, time_shift(1, config.head_dim, device), torch.zeros_like(keys))
        merge_attention(torch.cat([keys[0], keys[0]]), zeros(2, config.num_heads, _SIDE))

    def detail() -> None:
        large, small = (zeros(1, side, side, 3, dtype=torch.uint8) for side in (16, 8))
        transfer(large, resize(large, 8, 8, "bicubic"), following(small, small))

    return [encode, decode, denoise, attend, detail]
