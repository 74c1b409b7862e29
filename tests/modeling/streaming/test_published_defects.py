"""Published defects of the mask cache that are no matter of which tokens it chooses: each by a
check that the published way fails and ours passes.

What it forgets of a rolling window: `test_mask_cache`. Fixed shares, lag and noise: `test_follow`.
Steps that training never saw: `test_rollout`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.config import MaskCacheConfig, Scope
from modeling.diffusion.flow import FlowSchedule
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.rope import rotate
from modeling.diffusion.transformer import Transformer
from modeling.streaming.kv_cache import Cached, KVCache
from modeling.streaming.mask_cache import MaskCache
from modeling.streaming.stream import EditStream
from tests.known_editors import block_clip, known_editor
from tests.modeling.streaming.test_follow import (
    FOLLOW,
    PUBLISHED,
    F,
    Where,
    edit,
    nowhere,
    scene,
)
from tests.modeling.streaming.test_follow import cache as mask_cache
from tests.modeling.streaming.test_kv_cache import CHUNK, CONFIG, HEIGHT, WIDTH, cache, latents
from tests.modeling.streaming.test_kv_cache import transformer as transformer

SETTLED = MaskCacheConfig(policy="settled", scope="block", pruned_steps=(1, 2, 3), threshold=1e-3)
LONG = 50  # chunks


def sees_alike_however_long_it_lasts(kv: KVCache) -> None:
    """A pruned step over the same sink, history and chunk: what it sees does not depend on how long
    the stream has been going on."""
    shape = (3, 1, kv.slot_tokens, CONFIG.num_heads, CONFIG.head_dim)
    q, k, v = torch.randn(shape, generator=torch.manual_seed(3))
    kept = torch.tensor([0, 2, 7])
    seen: dict[int, Tensor] = {}
    for chunk in range(LONG):
        whole = Cached(kv)
        rope = whole.begin(CHUNK, HEIGHT // 2, WIDTH // 2, CONFIG.head_dim, q.device)
        if kv.history_slots == kv.slots - 1 and chunk in (kv.slots - 1, 20, LONG - 1):
            pruned = Cached(kv, Reuse("attention", k, kept, fixed_size=False))
            few = pruned.begin(CHUNK, HEIGHT // 2, WIDTH // 2, CONFIG.head_dim, q.device)
            turned = (rotate(x[:, kept], few) for x in (q, k))
            seen[chunk] = pruned.attend(0, *turned, v[:, kept])
        whole.attend(0, *(rotate(x, rope) for x in (q, k)), v)
        kv.commit()
    first, *later = seen.values()
    assert len(later) == 2
    for one in later:
        torch.testing.assert_close(one, first, atol=1e-4, rtol=1e-4)


def test_pruned_steps_of_a_long_stream_stay_where_they_were_trained() -> None:
    """The published cache prunes at absolute positions only, whose distance to the sinks grows."""
    sees_alike_however_long_it_lasts(cache(12, 3))
    with pytest.raises(AssertionError):
        sees_alike_however_long_it_lasts(cache(12, 3, window_positions=False))


def masks(streams: list[EditStream], clips: list[np.ndarray]) -> list[list[np.ndarray]]:
    """What each stream recomputes, chunk by chunk, where they take turns."""
    made: list[list[np.ndarray]] = [[] for _ in streams]
    for first, until in ((0, 9), (9, 21)):
        for chunks, stream, clip in zip(made, streams, clips, strict=True):
            chunks += [chunk.mask for chunk in stream.push(clip[first:until])]
    return made


def test_a_clip_knows_nothing_of_another_s_mask() -> None:
    """The published mask is one attribute for all clips, which a clip's first chunk alone ignores:
    as one cache in two streams would."""
    editor = known_editor(mask_cache=replace(PUBLISHED, keep_ratio=0.6))
    clips = [block_clip(21, 32, 64, seed) for seed in (1, 2)]

    def opened() -> list[EditStream]:
        return [editor.open("paint it red", height=32, width=64, seed=0) for _ in clips]

    alone = [masks([stream], [clip])[0] for stream, clip in zip(opened(), clips, strict=True)]

    def are_their_own(streams: list[EditStream]) -> None:
        for found, own in zip(masks(streams, clips), alone, strict=True):
            assert np.array_equal(found, own)

    are_their_own(opened())
    first, second = opened()
    second._mask = first._mask
    with pytest.raises(AssertionError):
        are_their_own([first, second])


def refine(mask: MaskCache, target: Tensor, source: Tensor) -> Tensor:
    """One chunk in four steps, each of which halves what is still wrong of what it computes."""
    clean = source
    for step in range(4):
        reuse = mask.reuse(step)
        if reuse is None or not reuse.idle:
            clean = mask.settle(step, clean + 0.5 * (target - clean), clean, source)
    mask.observe(clean, source)
    return clean


def thing(latent: int) -> Where:
    """Where a thing is that moves by two tokens from latent to latent."""
    where = nowhere()
    for n in range(F):
        where[n, 2:5, 2 * n + latent : 2 * n + latent + 3] = True
    return where


def test_what_moves_still_moves() -> None:
    """As much as where every step computes all. The published choice lets what moves on fade, even
    where what is not chosen keeps its own estimate, as here."""
    source = scene()

    def check(config: MaskCacheConfig) -> None:
        mask = mask_cache(config)
        for latent in (0, 6):
            target = edit(source, thing(latent), noise=1e-4)
            made = refine(mask, target, source)
        every = source + (1 - 0.5**4) * (target - source)
        moved, wanted = ((clip[:, 1:] - clip[:, :-1]).abs().mean() for clip in (made, every))
        assert moved > 0.99 * wanted

    check(FOLLOW)
    check(SETTLED)
    with pytest.raises(AssertionError):
        check(replace(PUBLISHED, scope="block"))


@pytest.mark.parametrize("wrong", ["attention", "feedforward"])
def test_nothing_of_another_noise_level_stands_in(transformer: Transformer, wrong: Scope) -> None:
    """A token that a step does not compute stays what it was. In the published way it gets what a
    layer put out at the first noise level and goes on with that: with feed-forward layers movement
    and quality collapse."""
    flow, text = FlowSchedule(5.0), torch.ones(1, 4, 8)
    times = flow.warp([1000, 750, 500, 250])

    def check(config: MaskCacheConfig) -> None:
        mask = MaskCache(
            config, CONFIG, chunk_latents=CHUNK, latent_height=HEIGHT, latent_width=WIDTH
        )
        mask.observe(*latents(CHUNK, seed=7))
        noise, source = latents(CHUNK)
        kv, clean, left = cache(6), source, 0
        for step, t in enumerate(times):
            reuse, before = mask.reuse(step), clean
            noisy = flow.add_noise(clean, noise, t[None])
            velocity = transformer(noisy, source, t[None], text, Cached(kv, reuse))
            clean = mask.settle(step, flow.to_x0(noisy, velocity, t[None]), clean, source)
            if step in config.pruned_steps:
                out = ~mask.cell_mask().expand_as(clean)
                left += int(out.sum())
                assert torch.equal(clean[out], before[out])
        assert left

    check(replace(FOLLOW, threshold=0.5, dilate=0))
    check(MaskCacheConfig(policy="budget", scope="block", keep_ratio=0.3))
    options: dict[str, Any] = {"keep_ratio": 0.5, "scope": wrong}
    with pytest.raises(AssertionError):
        check(MaskCacheConfig(**options))
