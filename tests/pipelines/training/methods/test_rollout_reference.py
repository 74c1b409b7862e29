"""The rollout against one without a cache: lists of raw keys, rotated and joined anew in each call.

What the published description says and nothing more: a chunk is denoised from noise over what it
may see, the clean chunk's keys at timestep 0 become history, the first `sink_latents` stay and
beside them the newest that fit the window, and positions count from 0 inside it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.config import MaskCacheConfig, StreamConfig, TransformerConfig
from modeling.diffusion.attention import attention
from modeling.diffusion.flow import FlowSchedule
from modeling.diffusion.rope import Rope, rope_table, rotate
from modeling.diffusion.transformer import Transformer
from modeling.streaming.history import Remembered
from pipelines.training.methods.rollout import rollout
from tests.modeling.networks import random_transformer

CONFIG = TransformerConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4,
    latent_channels=4, source_channels=4,
)  # fmt: skip
STREAM = StreamConfig(height=32, width=32, chunk_latents=2, window_latents=6, sink_latents=2)
SHIFT = 5.0


@dataclass
class Chunk:
    """What one chunk sees: `before`, older chunks with their first positions, and itself."""

    before: list[tuple[Chunk, int]]
    position: int
    reuse: None = None
    keys: dict[int, Tensor] = field(default_factory=dict)  # of each layer, not rotated
    values: dict[int, Tensor] = field(default_factory=dict)

    def begin(self, frames: int, height: int, width: int, head_dim: int, device: Any) -> Rope:
        self.frames, self.grid = frames, (height, width, head_dim)
        angles = torch.zeros(frames * height * width, head_dim // 2)
        return Rope(angles.cos(), angles.sin())  # leaves q and k as they are

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[layer], self.values[layer] = k, v
        seen = [*self.before, (self, self.position)]
        keys = torch.cat([self.at(chunk.keys[layer], place) for chunk, place in seen], dim=1)
        values = torch.cat([chunk.values[layer] for chunk, _ in seen], dim=1)
        return attention(self.at(q, self.position), keys, values)

    def at(self, x: Tensor, position: int) -> Tensor:
        times = torch.arange(position, position + self.frames)
        return rotate(x, rope_table(times, *self.grid))


def next_chunk(history: list[Chunk], frames: int, stream: StreamConfig) -> Chunk:
    chunk = stream.chunk_latents
    seen = list(enumerate(history))
    sinks = stream.sink_latents // chunk
    recent = stream.window_latents // chunk - 1 - sinks
    rolls = frames > stream.window_latents
    if rolls:
        newest = seen[sinks:][-recent:] if recent else []
        seen = seen[:sinks] + newest
    if rolls and stream.window_positions:
        places = range(0, len(seen) * chunk, chunk)
        return Chunk([(c, p) for (_, c), p in zip(seen, places, strict=True)], len(seen) * chunk)
    return Chunk([(c, n * chunk) for n, c in seen], len(history) * chunk)


def reference(
    network: Transformer,
    source: Tensor,
    text: Tensor,
    last_step: int,
    stream: StreamConfig,
    truth: Tensor | None = None,
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    levels = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in (n / 1000 for n in stream.timesteps)]
    history: list[Chunk] = []
    made = []
    truths = None if truth is None else iter(truth.split(stream.chunk_latents, dim=1))
    for piece in source.split(stream.chunk_latents, dim=1):
        noisy = torch.randn(piece.shape, generator=generator)
        for step in range(last_step + 1):
            time = torch.full(piece.shape[:1], 1000 * levels[step])
            with torch.set_grad_enabled(step == last_step):
                seen = next_chunk(history, source.shape[1], stream)
                clean = noisy - levels[step] * network(noisy, piece, time, text, seen)
            if step < last_step:
                noise = torch.randn(piece.shape, generator=generator)
                noisy = (1 - levels[step + 1]) * clean + levels[step + 1] * noise
        made.append(clean)
        with torch.no_grad():
            history.append(next_chunk(history, source.shape[1], stream))
            past = clean if truths is None else next(truths)
            network(past, piece, torch.zeros(piece.shape[0]), text, history[-1])
    return torch.cat(made, dim=1)


@pytest.fixture(scope="module")
def network() -> Transformer:
    return random_transformer(CONFIG, std=0.2)


STREAMS = {
    "sinks": STREAM,
    "no sinks": replace(STREAM, sink_latents=0),
    "sinks alone": replace(STREAM, window_latents=4),
    "two sinks": replace(STREAM, window_latents=8, sink_latents=4),
    "positions of the clip": replace(STREAM, window_positions=False),
    "three steps": replace(STREAM, timesteps=(1000, 600, 100)),
}


CASES = [
    *(("sinks", frames, 1) for frames in (2, 6, 8, 12)),  # a chunk, the window, just over, far over
    *((name, 10, 1) for name in STREAMS if name != "sinks"),
    ("three steps", 8, 2),
    ("no sinks", 8, 0),
]


@pytest.mark.parametrize(("name", "frames", "last_step"), CASES)
def test_clip_and_gradient_equal_those_without_a_cache(
    network: Transformer, name: str, frames: int, last_step: int
) -> None:
    stream = STREAMS[name]
    generator = torch.Generator().manual_seed(frames)
    source = torch.randn(2, frames, 4, 4, 4, generator=generator)
    text = torch.randn(2, 4, 8, generator=generator)
    direction = torch.randn(source.shape, generator=generator)
    wanted = reference(network, source, text, last_step, stream)
    made = rollout(
        network,
        network,
        CONFIG,
        stream,
        FlowSchedule(SHIFT),
        source=source,
        text=text,
        last_step=last_step,
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(made, wanted, atol=2e-4, rtol=1e-4)
    parameters = list(network.parameters())
    gradients = [torch.autograd.grad((x * direction).mean(), parameters) for x in (made, wanted)]
    for got, right in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, atol=1e-4 * right.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("cache", [None, MaskCacheConfig(policy="budget", keep_ratio=1.0)])
def test_a_history_that_is_the_truth(network: Transformer, cache: MaskCacheConfig | None) -> None:
    """Of clips together, and each by itself, as a mask cache wants them; this one skips nothing."""
    draw = torch.Generator().manual_seed(8)
    source, truth = torch.randn(2, 2, 8, 4, 4, 4, generator=draw)
    text = torch.randn(2, 4, 8, generator=draw)

    def made(truth: Tensor) -> Tensor:
        return rollout(
            None, network, CONFIG, replace(STREAM, mask_cache=cache), FlowSchedule(SHIFT),
            source=source, text=text, last_step=1, generator=torch.Generator().manual_seed(1),
            truth=truth,
        )  # fmt: skip

    clips = slice(0, 1 if cache else 2)  # those whose noise the reference draws, too
    wanted = reference(network, source[clips], text[clips], 1, STREAM, truth[clips])
    found = made(truth)
    torch.testing.assert_close(found[clips], wanted, atol=2e-4, rtol=1e-4)
    truth[1, :2] += 1
    changed = (made(truth) - found).abs().amax(dim=(2, 3, 4))
    assert changed[0].max() == 0
    assert changed[1, :2].max() == 0  # its own chunk
    assert changed[1, 2:].min() > 1e-3


def test_what_is_remembered_has_the_networks_type(network: Transformer) -> None:
    seen: list[Remembered] = []
    small = deepcopy(network).bfloat16()

    def noting(*args: Any) -> Tensor:
        seen.append(args[-1])
        answer: Tensor = small(*args)
        return answer

    rollout(
        None,
        noting,
        CONFIG,
        STREAM,
        FlowSchedule(SHIFT),
        source=torch.zeros(1, 4, 4, 4, 4),
        text=torch.zeros(1, 4, 8),
        last_step=0,
        generator=torch.Generator(),
        dtype=torch.bfloat16,
    )
    assert {keys.dtype for visible in seen for keys, _ in visible.history.seen} == {torch.bfloat16}
