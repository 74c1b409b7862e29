"""The count of model FLOPs, against PyTorch's own counter on the real network."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling.config import MaskCacheConfig, StreamConfig, TransformerConfig
from modeling.diffusion.attention import Spans, bidirectional, chunk_causal, teacher_forcing
from modeling.diffusion.flops import forward_flops
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import Transformer
from modeling.streaming.history import History, Remembered
from pipelines.training.methods.rollout import rollout_flops

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


PRUNED = MaskCacheConfig(keep_ratio=0.25, pruned_steps=(1,))


@pytest.mark.parametrize("window", [6, 12])
@pytest.mark.parametrize(
    ("mask", "close"),
    # By block the patches of tokens that are left out are embedded all the same.
    [(None, 0.0), (PRUNED, 0.0), (replace(PRUNED, scope="block"), 0.1)],
    ids=["dense", "attention", "block"],
)
def test_a_rollouts_chunks_cost_what_pytorch_counts(
    window: int, mask: MaskCacheConfig | None, close: float
) -> None:
    stream = StreamConfig(
        height=8 * HEIGHT, width=8 * WIDTH, chunk_latents=CHUNK, window_latents=window,
        sink_latents=0, mask_cache=mask,
    )  # fmt: skip
    network = Transformer(CONFIG)
    size = {"latent_height": HEIGHT, "latent_width": WIDTH}
    history = History(CONFIG, stream, batch=1, **size)  # type: ignore[arg-type]
    count = partial(forward_flops, CONFIG, height=HEIGHT, width=WIDTH)
    steps = [rollout_flops(count, 12, stream, step) for step in (0, 1, None)]
    assert steps[0] == steps[2]
    for number, (dense, pruned) in enumerate(zip(*steps[:2], strict=True)):
        ours = counted(network, CHUNK, Remembered(history)) - small_parts(network)
        assert dense == ours
        if mask is None or number == 0:  # a first chunk has nothing to go by
            assert pruned == dense
        else:
            kept = torch.arange(CHUNK * HEIGHT * WIDTH // 4 // 4)
            outputs = torch.zeros(CONFIG.num_layers, 1, CHUNK * HEIGHT * WIDTH // 4, CONFIG.dim)
            reuse = Reuse(mask.scope, outputs, kept, fixed_size=True)
            found = counted(network, CHUNK, Remembered(history, reuse)) - small_parts(network)
            assert pruned == pytest.approx(found, rel=close, abs=0)
        history.commit(*history.empty())
