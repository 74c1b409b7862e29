"""Self-forcing: the generator makes a clip chunk by chunk, as a stream will, over its own history.

B batch, F latents, C channels, h x w latent size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from modeling.config import StreamConfig, TransformerConfig
from modeling.diffusion.flow import FlowSchedule
from modeling.streaming.kv_cache import Cached, KVCache

Network = Callable[..., Tensor]  # Transformer.forward


def exit_step(seed: int, step: int, steps: int) -> int:
    """Which of `steps` denoising steps a rollout ends at; the same on all ranks and after a resume.

    All ranks must run equally many forwards, or collectives hang.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return int(torch.randint(steps, (), generator=generator))


def rollout(
    trained: Network | None,
    passed: Network,
    config: TransformerConfig,
    stream: StreamConfig,
    schedule: FlowSchedule,
    *,
    source: Tensor,
    text: Tensor,
    last_step: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Clean latents [B, F, C, h, w] that the generator makes of `source` [B, F, C, h, w].

    Each chunk is denoised from pure noise along `stream.timesteps` and ends after step
    `last_step` (0 is the first) with that step's clean estimate. Only that step has gradient,
    through `trained` (the engine; None for a rollout without any); all others, and the refresh at
    timestep 0 that writes the chunk into the history, go through `passed` without gradient. So a
    chunk's gradient sees its history as constant.

    `config` are the sizes and `dtype` the type of the keys and values that are remembered.
    """
    frames, chunk = source.shape[1], stream.chunk_latents
    timesteps = schedule.warp(stream.timesteps)[: last_step + 1]
    cache = _cache(config, stream, source, dtype)
    starts = range(0, frames, chunk)
    made = []
    for start in starts:
        piece = source[:, start : start + chunk]
        noisy = _noise_like(piece, generator)
        with torch.no_grad():
            for now, following in pairwise(timesteps):
                estimate = _denoise(passed, schedule, noisy, piece, now, text, cache)
                noise = _noise_like(piece, generator)
                noisy = schedule.add_noise(estimate, noise, _each(following, piece))
        with torch.set_grad_enabled(trained is not None):
            network = trained or passed
            clean = _denoise(network, schedule, noisy, piece, timesteps[-1], text, cache)
        made.append(clean)
        if start != starts[-1]:
            with torch.no_grad():
                zero = torch.zeros_like(timesteps[0])
                passed(clean.detach(), piece, _each(zero, piece), text, Cached(cache))
                cache.commit()
    return torch.cat(made, dim=1)


def seen_pairs(frames: int, stream: StreamConfig) -> list[int]:
    """How many (query, key) pairs of latents see each other in each chunk of a rollout."""
    chunk = stream.chunk_latents
    return [chunk * min(end, stream.window_latents) for end in range(chunk, frames + chunk, chunk)]


def _denoise(
    network: Network,
    schedule: FlowSchedule,
    noisy: Tensor,
    source: Tensor,
    timestep: Tensor,
    text: Tensor,
    cache: KVCache,
) -> Tensor:
    """The clean estimate [B, chunk, C, h, w] in float32."""
    times = _each(timestep, source)
    return schedule.to_x0(noisy, network(noisy, source, times, text, Cached(cache)), times)


def _cache(
    config: TransformerConfig, stream: StreamConfig, source: Tensor, dtype: torch.dtype
) -> KVCache:
    """Memory for the clip's history; a clip that fits the window never rolls and needs no sinks."""
    batch, frames, _, height, width = source.shape
    rolls = frames > stream.window_latents
    return KVCache(
        config,
        batch=batch,
        latent_height=height,
        latent_width=width,
        chunk_latents=stream.chunk_latents,
        window_latents=stream.window_latents if rolls else frames,
        sink_latents=stream.sink_latents if rolls else 0,
        window_positions=stream.window_positions and rolls,
        rolls=rolls,
        device=source.device,
        dtype=dtype,
    )


def _each(timestep: Tensor, latents: Tensor) -> Tensor:
    return timestep.expand(latents.shape[0])


def _noise_like(latents: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(latents.shape, device=latents.device, generator=generator)
