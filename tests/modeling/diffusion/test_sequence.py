"""A clip on three ranks of gloo against the whole clip in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from infra.runtime.errors import UserError
from modeling.config import MaskCacheConfig, TransformerConfig
from modeling.diffusion.attention import Visibility, bidirectional, chunk_causal, teacher_forcing
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.sequence import Sequence, by_latents
from modeling.diffusion.transformer import Transformer
from modeling.streaming.kv_cache import Cached, KVCache
from modeling.streaming.mask_cache import MaskCache
from tests.modeling.networks import random_transformer

CONFIG = TransformerConfig(
    dim=48, ffn_dim=40, num_heads=6, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4,
    latent_channels=4, source_channels=4,
)  # fmt: skip
WORLD = 3
CHUNK, WINDOW, SINKS, HEIGHT, WIDTH = 2, 6, 2, 4, 6  # 6 tokens a latent
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def network() -> Transformer:
    return random_transformer(CONFIG, std=0.3)


def test_what_is_kept_of_a_forward_without_gradients_serves_one_with_them() -> None:
    asked = (Sequence(None, 0, 1), 3, 4, torch.device("cpu"))  # type: ignore[arg-type]
    with torch.inference_mode():
        first = by_latents(*asked)
    split = by_latents(*asked)
    assert split is first
    x = torch.ones(2, 3 * 4, 5, requires_grad=True)
    (x.index_select(1, split.own) * x.index_select(1, split.forth)).sum().backward()
    assert x.grad is not None


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def gradients(net: Transformer, visible: Visibility, frames: int) -> dict[str, Tensor]:
    """Of a loss that weighs every place differently, and that loss."""
    noisy, source = drawn(2, frames, 4, HEIGHT, WIDTH), drawn(2, frames, 4, HEIGHT, WIDTH) + 1
    timestep = 1000 * torch.rand(2, frames, generator=torch.Generator().manual_seed(1))
    out = net(noisy, source, timestep, drawn(2, 3, 8), visible)
    loss = (out * drawn(*out.shape)).square().mean()
    loss.backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert len(found) == len(list(net.parameters()))
    return {**found, "loss": loss.detach(), "out": out.detach()}


def of_a_whole_clip(net: Transformer, shared: Transformer, sequence: Sequence) -> None:
    for visible, checkpointing, recomputes in (
        (bidirectional(6), False, True),
        (chunk_causal(6, 3), True, True),
        (teacher_forcing(4, 2), True, False),
    ):
        for each in (net, shared):
            each.zero_grad()
            each.gradient_checkpointing = checkpointing
            each.recompute_attention = recomputes
        frames = len(visible.positions)
        whole, own = gradients(net, visible, frames), gradients(shared, visible, frames)
        means = torch.cat([value.flatten() for value in own.values()])
        distributed.all_reduce(means)
        means = (means / sequence.size).split([value.numel() for value in own.values()])
        for name, mean in zip(own, means, strict=True):
            torch.testing.assert_close(mean, whole[name].flatten(), **CLOSE, msg=name)


@torch.no_grad()
def of_a_stream(net: Transformer, shared: Transformer, sequence: Sequence) -> None:
    """Chunks over a window that rolls, with every kind of reuse."""
    text = drawn(1, 3, 8)
    kinds = ("budget", "block"), ("published", "attention"), ("budget", "feedforward")
    for policy, scope in kinds:
        # 7 tokens of a chunk's 12 do not divide by the ranks, nor do the latents' shares of them.
        config = MaskCacheConfig(policy=policy, scope=scope, keep_ratio=0.6, pruned_steps=(1,))  # type: ignore[arg-type]
        made = []
        for each, sizes in ((net, CONFIG), (shared, sequence.heads_of(CONFIG))):
            cache = KVCache(
                sizes, batch=1, latent_height=HEIGHT, latent_width=WIDTH, chunk_latents=CHUNK,
                window_latents=WINDOW, sink_latents=SINKS,
            )  # fmt: skip
            mask = MaskCache(
                config, CONFIG, chunk_latents=CHUNK, latent_height=HEIGHT, latent_width=WIDTH
            )

            def velocity(
                noisy: Tensor,
                source: Tensor,
                time: float,
                reuse: Reuse | None,
                each: Transformer = each,
                cache: KVCache = cache,
            ) -> Tensor:
                out: Tensor = each(noisy, source, torch.tensor([time]), text, Cached(cache, reuse))
                return out

            for chunk in range(4):
                source = drawn(1, CHUNK, 4, HEIGHT, WIDTH) + chunk
                noisy = drawn(1, CHUNK, 4, HEIGHT, WIDTH) - chunk
                for step in (0, 1):
                    made.append(velocity(noisy, source, 900.0 - step, mask.reuse(step)))
                velocity(made[-1], source, 0.0, None)
                cache.commit()
                mask.observe(made[-1], source)
                assert mask.tokens is not None
                assert 0 < len(mask.tokens) < mask.token_count
        half = len(made) // 2
        for whole, own in zip(made[:half], made[half:], strict=True):
            torch.testing.assert_close(own, whole, **CLOSE)


def between(net: Transformer, shared: Transformer, sequence: Sequence) -> None:
    """What one rank has on all of them, and what each attends with."""
    mine = torch.full((3, 2), float(sequence.rank)).t()  # not as it lies in memory
    assert not sequence.same(mine).any()
    heads = torch.arange(4 * 6).view(4, 6, 1)
    first = 2 * sequence.rank
    assert torch.equal(sequence.own_heads(heads), heads[:, first : first + 2])


def refusals(net: Transformer, shared: Transformer, sequence: Sequence) -> None:
    with pytest.raises(UserError, match=r"sequence_parallel=\d does not divide the 1 heads"):
        sequence.heads_of(replace(CONFIG, dim=8, num_heads=1))
    for frames in (1, WORLD):  # of each latent, whatever there is of all
        latents, visible = torch.zeros(1, frames, 4, 10, 10), bidirectional(frames)
        with pytest.raises(UserError, match=r"sequence_parallel=\d does not divide the 25 tokens"):
            shared(latents, latents, torch.zeros(1), torch.zeros(1, 1, 8), visible)


def _rank(rank: int, world: int, meeting: str, checks: tuple[Callable[..., None], ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
    )
    group = distributed.new_group(list(range(world)))
    net = network()
    shared = copy.deepcopy(net)
    shared.sequence = Sequence(group, rank, world)
    for check in checks:
        check(net, shared, shared.sequence)
    distributed.destroy_process_group()


def test_ranks_that_share_a_clip_make_what_one_makes(tmp_path: Path) -> None:
    checks = (of_a_whole_clip, of_a_stream, between, refusals)
    multiprocessing.start_processes(
        _rank, (WORLD, str(tmp_path / "meeting"), checks), nprocs=WORLD, start_method="fork"
    )
