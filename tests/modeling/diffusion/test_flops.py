"""The count of model FLOPs, against PyTorch's own counter on the real network."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling.config import StreamConfig, TransformerConfig
from modeling.diffusion.attention import Spans, bidirectional, chunk_causal, teacher_forcing
from modeling.diffusion.flops import forward_flops
from modeling.diffusion.transformer import Transformer
from modeling.streaming.kv_cache import Cached, KVCache
from pipelines.training.methods.rollout import seen_pairs

HEIGHT, WIDTH, FRAMES, CHUNK = 8, 12, 6, 3
CONFIG = TransformerConfig(
    dim=96, ffn_dim=160, num_heads=4, num_layers=3, text_dim=40, text_tokens=16
)
TEXT = torch.zeros(1, 16, 40)


def counted(network: Transformer, frames: int, visible: object) -> int:
    latents = torch.zeros(1, frames, 16, HEIGHT, WIDTH)
    math = sdpa_kernel(SDPBackend.MATH)  # PyTorch does not count its kernel for CPUs
    with math, torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(latents, latents, torch.zeros(1), TEXT, visible)  # type: ignore[arg-type]
    return int(counter.get_total_flops())


def small_parts(network: Transformer) -> int:
    """The timestep's embedding, which is left out: one row, whatever the clip."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.time_projection(network.embed_time(torch.zeros(1)))
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "visible",
    [bidirectional(FRAMES), chunk_causal(FRAMES, CHUNK), teacher_forcing(FRAMES, CHUNK)],
    ids=["bidirectional", "chunk_causal", "teacher_forcing"],
)
def test_a_clip_costs_what_pytorch_counts(visible: Spans) -> None:
    network = Transformer(CONFIG)
    frames = len(visible.positions)
    ours = forward_flops(CONFIG, frames=frames, pairs=visible.pairs, height=HEIGHT, width=WIDTH)
    assert ours == counted(network, frames, visible) - small_parts(network)


@pytest.mark.parametrize("window", [6, 12])
def test_a_rollouts_chunks_cost_what_pytorch_counts(window: int) -> None:
    stream = StreamConfig(
        height=8 * HEIGHT, width=8 * WIDTH, chunk_latents=CHUNK, window_latents=window,
        sink_latents=0, mask_cache=None,
    )  # fmt: skip
    network = Transformer(CONFIG)
    cache = KVCache(
        CONFIG, batch=1, latent_height=HEIGHT, latent_width=WIDTH, chunk_latents=CHUNK,
        window_latents=window,
    )  # fmt: skip
    for pairs in seen_pairs(12, stream):
        ours = forward_flops(CONFIG, frames=CHUNK, pairs=pairs, height=HEIGHT, width=WIDTH)
        assert ours == counted(network, CHUNK, Cached(cache)) - small_parts(network)
        cache.commit()
