from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling.config import MaskCacheConfig
from modeling.diffusion.transformer import Transformer
from modeling.streaming.kv_cache import Cached
from modeling.streaming.mask_cache import MaskCache
from modeling.streaming.policies import POLICIES, budget_tokens, published_tokens
from tests.modeling.streaming.test_kv_cache import (
    CHUNK,
    CONFIG,
    HEIGHT,
    WIDTH,
    cache,
    latents,
    transformer,
)

__all__ = ["transformer"]

TOKENS = HEIGHT * WIDTH // 4  # of a latent
CHUNK_TOKENS = CHUNK * TOKENS


def mask_cache(**options: object) -> MaskCache:
    return MaskCache(
        MaskCacheConfig(**options),  # type: ignore[arg-type]
        CONFIG,
        chunk_latents=CHUNK,
        latent_height=HEIGHT,
        latent_width=WIDTH,
    )


def smooth(frames: int, height: int, width: int, length: float) -> torch.Tensor:
    """Random importance with a correlation length in latent cells."""
    noise = torch.randn(frames, 1, height, width, generator=torch.manual_seed(0))
    x = torch.arange(-24, 25.0)
    kernel = (-(x**2) / (2 * length**2)).exp()
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        noise = torch.nn.functional.conv2d(noise, kernel.view(shape), padding="same")
    return noise[:, 0]


@pytest.mark.parametrize(
    ("length", "share"), [(None, 0.083), (1.0, 0.21), (2.0, 0.25), (4.0, 0.28), (8.0, 0.29)]
)
def test_published_policy_keeps_what_was_measured(length: float | None, share: float) -> None:
    generator = torch.manual_seed(0)
    importance = (
        torch.rand(3, 60, 104, generator=generator)
        if length is None
        else smooth(3, 60, 104, length)
    )
    tokens = published_tokens(importance, 0.3)
    assert len(tokens) / 4680 == pytest.approx(share, abs=0.02)
    assert len(set(tokens.div(1560, rounding_mode="floor").bincount().tolist())) == 1


def test_published_policy_by_hand() -> None:
    """One token of each latent wholly important, one by half: only the whole one survives."""
    importance = torch.zeros(2, 4, 4)
    importance[:, :2, :2] = 1.0
    importance[:, 2, 2:] = 0.5
    assert published_tokens(importance, 6 / 16).tolist() == [0, 4]


def test_published_policy_counts_cells() -> None:
    """Three cells of each of two tokens: of 5 kept cells one token has enough, of 6 both."""
    importance = torch.zeros(1, 4, 4)
    importance[0, :2, :2] = torch.tensor([[10.0, 9.0], [8.0, 0.0]])
    importance[0, :2, 2:] = torch.tensor([[7.0, 6.0], [5.0, 0.0]])
    assert published_tokens(importance, 5.6 / 16).tolist() == [0]  # rounded down
    assert published_tokens(importance, 6 / 16).tolist() == [0, 1]
    assert published_tokens(importance, 0.9 / 16).tolist() == []


def test_published_policy_drops_the_tail_of_the_longer_list() -> None:
    importance = torch.zeros(2, 4, 4)
    importance[0, :2, :2] = importance[0, 2:, 2:] = 1.0  # tokens 0 and 3
    importance[1, 2:, 2:] = 1.0  # token 3, and four cells that make no token
    importance[1, 0, :] = 0.5
    assert published_tokens(importance, 0.5).tolist() == [0, 4 + 3]


def test_budget_policy_by_hand() -> None:
    """One cell, at the corner of its token: the three tokens that touch it are kept too."""
    importance = torch.zeros(1, 6, 6)
    importance[0, 1, 2] = 1.0
    assert budget_tokens(importance, 4 / 9).tolist() == [0, 1, 3, 4]
    assert budget_tokens(importance, 3.6 / 9).tolist() == [0, 1, 3, 4]  # rounded
    assert len(budget_tokens(importance, 0.001)) == 1


def test_budget_policy_keeps_exactly_its_share() -> None:
    importance = torch.rand(3, 60, 104, generator=torch.manual_seed(0))
    tokens = budget_tokens(importance, 0.3)
    assert len(tokens) == 1404
    assert torch.equal(tokens, tokens.sort().values)
    one = torch.zeros(3, 60, 104)
    one[1, 30, 50] = 1.0
    assert 1560 + 15 * 52 + 25 in budget_tokens(one, 4 / 4680).tolist()


@pytest.mark.parametrize(("policy", "counts"), [("published", {0, 18}), ("budget", {9})])
def test_a_graph_serves_all_chunks_only_where_they_keep_equally_many(
    policy: str, counts: set[int]
) -> None:
    """A step that stores what is reused is one of all tokens."""
    edited, source = latents(CHUNK, seed=7)
    corner = source.clone()
    corner[..., :1, :1] += 1  # of no whole token
    found = set()
    for made in (edited, corner):
        mask = mask_cache(policy=policy, keep_ratio=0.5)
        mask.observe(made, source)
        stored, pruned = mask.reuse(0), mask.reuse(1)
        assert stored is not None
        assert pruned is not None
        assert (stored.tokens, stored.fixed_size) == (None, True)
        assert pruned.tokens is not None
        assert pruned.fixed_size is (len(counts) == 1)
        found.add(len(pruned.tokens))
    assert found == counts
    for name in ("follow", "settled"):  # which keep what the picture asks for
        assert not POLICIES[name].fixed_size


@pytest.mark.parametrize(("scope", "layers"), [("attention", 2), ("feedforward", 2), ("block", 0)])
def test_layers_outputs_are_kept_where_they_stand_in(scope: str, layers: int) -> None:
    made = MaskCache(
        MaskCacheConfig(scope=scope), CONFIG, chunk_latents=CHUNK, latent_height=HEIGHT,
        latent_width=WIDTH, device="meta", dtype=torch.bfloat16,
    )  # fmt: skip
    assert made._outputs.shape == (layers, 1, CHUNK_TOKENS, CONFIG.dim)
    assert (made._outputs.device.type, made._outputs.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("policy", ["published", "budget"])
@pytest.mark.parametrize("scope", ["attention", "feedforward", "block"])
def test_keeping_all_equals_dense(transformer: Transformer, policy: str, scope: str) -> None:
    mask = mask_cache(policy=policy, scope=scope, keep_ratio=1.0)
    mask.observe(*latents(CHUNK, seed=7))
    assert mask.tokens is not None
    assert len(mask.tokens) == mask.token_count
    kv, text = cache(6), torch.ones(1, 4, 8)
    for step, (noisy, source) in enumerate((latents(CHUNK), latents(CHUNK, 2), latents(CHUNK, 3))):
        t = torch.tensor([900.0 - step])
        pruned = transformer(noisy, source, t, text, Cached(kv, mask.reuse(step)))
        dense = transformer(noisy, source, t, text, Cached(kv))
        torch.testing.assert_close(pruned, dense, atol=1e-5, rtol=1e-5)


def test_pruned_tokens_keep_the_last_full_output(transformer: Transformer) -> None:
    """In a pruned step a token that is not kept gets the self-attention output of step 0."""
    mask = mask_cache(keep_ratio=0.5)
    mask.observe(*latents(CHUNK, seed=7))
    assert mask.tokens is not None
    full, pruned = mask.reuse(0), mask.reuse(1)
    assert full is not None
    assert pruned is not None
    assert mask.reuse(3) is None
    stored = torch.randn(1, mask.token_count, CONFIG.dim)
    assert full.exchange(1, stored) is stored
    kept = torch.zeros(1, len(mask.tokens), CONFIG.dim)
    filled = pruned.exchange(1, kept)
    chosen = torch.zeros(mask.token_count, dtype=torch.bool).index_fill(0, mask.tokens, True)
    assert filled[:, chosen].eq(0).all()
    assert torch.equal(filled[:, ~chosen], stored[:, ~chosen])
    assert torch.equal(full.outputs[1], stored)


@pytest.mark.parametrize("scope", ["attention", "feedforward", "block"])
def test_pruned_steps_leave_no_trace_in_a_rolling_window(
    transformer: Transformer, scope: str
) -> None:
    """What later chunks see is the clean refresh, whole, however the chunk was denoised."""
    text = torch.ones(1, 4, 8)
    mask = mask_cache(scope=scope, keep_ratio=0.3)
    pruned, refreshed = cache(9, 3), cache(9, 3)
    for index in range(7):
        noisy, source = latents(CHUNK, seed=index)
        for step in range(4):
            t = torch.tensor([900.0 - 200 * step])
            transformer(noisy, source, t, text, Cached(pruned, mask.reuse(step)))
        for kv in (pruned, refreshed):
            transformer(0.5 * noisy, source, torch.tensor([0.0]), text, Cached(kv))
            kv.commit()
        mask.observe(0.5 * noisy, source)
        states = pruned.state_dict(), refreshed.state_dict()
        for name in ("k", "v", "sink_k"):
            assert torch.equal(states[0][name], states[1][name]), (index, name)  # type: ignore[arg-type]


STEPS = (CHUNK_TOKENS, 5, 5, CHUNK_TOKENS, CHUNK_TOKENS)  # kept in each; the last is the refresh
WINDOW, SINKS = 12, 3  # latents: the sinks, two chunks and the one that is denoised


class OurWindow:
    def __init__(self) -> None:
        self.kv = cache(WINDOW, SINKS)

    def attend(self, chunk: int, kept: int) -> Tensor:
        """One step's part of each chunk in what is seen: a query of zeros sees the mean."""
        own = torch.zeros(1, kept, CONFIG.num_heads, CONFIG.head_dim)
        own[..., chunk] = 1
        seen = Cached(self.kv).attend(0, torch.zeros_like(own), own, own)[0, 0]
        return seen.view(-1)[: CONFIG.head_dim]

    def commit(self) -> None:
        self.kv.commit()


class PublishedWindow:
    """The published bookkeeping: two counters, of all tokens and of those in memory, of which a
    pruned step takes back what it does not keep; the next full step makes room for all its tokens
    as though they were new."""

    def __init__(self) -> None:
        self.keys: list[int] = []  # the chunk of each
        self.ever = self.here = self.first = 0

    def attend(self, chunk: int, kept: int) -> Tensor:
        size, sinks = WINDOW * TOKENS, SINKS * TOKENS
        until = self.first + kept
        if until > self.ever and kept + self.here > size:
            away = kept + self.here - size
            self.keys[sinks:] = self.keys[sinks + away :]
            self.here -= away
        end = self.here + until - self.ever
        self.keys[end - kept :] = [chunk] * kept
        self.here, self.ever = end, until
        return torch.tensor(self.keys).bincount(minlength=CONFIG.head_dim) / len(self.keys)

    def commit(self) -> None:
        self.first += CHUNK_TOKENS


def sees_its_whole_history(window: OurWindow | PublishedWindow) -> None:
    """In every full step and refresh, also once the oldest chunk has given way."""
    for chunk in range(8):
        for kept in STEPS:
            seen = window.attend(chunk, kept)
            if kept == CHUNK_TOKENS:
                wanted = torch.tensor(
                    [n in (0, chunk - 2, chunk - 1, chunk) for n in range(CONFIG.head_dim)]
                )
                torch.testing.assert_close(seen, wanted / wanted.sum())
        window.commit()


def test_pruned_steps_take_nothing_from_a_rolling_history() -> None:
    """The published cache forgets as many tokens as it kept, for the last step and the refresh."""
    sees_its_whole_history(OurWindow())
    with pytest.raises(AssertionError):
        sees_its_whole_history(PublishedWindow())
    short = PublishedWindow()  # while the window is not full it is right
    for chunk in range(WINDOW // CHUNK - 1):
        for kept in STEPS:
            seen = short.attend(chunk, kept)
        torch.testing.assert_close(seen[: chunk + 1], torch.full((chunk + 1,), 1 / (chunk + 1)))
        short.commit()


@pytest.mark.parametrize(
    ("scope", "layers"),
    [("attention", CONFIG.num_layers), ("feedforward", CONFIG.num_layers), ("block", 0)],
)
def test_only_what_stands_in_takes_memory(scope: str, layers: int) -> None:
    """By block a token's own estimate does, of which the stream has one."""
    assert mask_cache(scope=scope)._outputs.shape == (layers, 1, CHUNK_TOKENS, CONFIG.dim)


def test_first_chunk_recomputes_everything() -> None:
    mask = mask_cache()
    assert mask.reuse(1) is None
    assert mask.recomputed(4) == 1.0
    assert mask.token_mask().all()
    mask.observe(*latents(CHUNK))
    assert mask.recomputed(4) == pytest.approx(1 - 2 / 5 * (1 - 5 / 18))  # 5 of 18 tokens
