"""What a rollout remembers, against the ring of a stream, and how long it is kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from modeling.config import StreamConfig
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.rope import rotate
from modeling.streaming.history import History, Remembered, Unrolled
from modeling.streaming.kv_cache import Cached, KVCache
from tests.modeling.streaming.test_kv_cache import CHUNK, CONFIG, HEIGHT, WIDTH

BATCH, LAYERS = 2, CONFIG.num_layers
GRID = (HEIGHT // 2, WIDTH // 2)
TOKENS = CHUNK * GRID[0] * GRID[1]
HEADS = (CONFIG.num_heads, CONFIG.head_dim)
CPU = torch.device("cpu")
PLACE = (CHUNK, *GRID, CONFIG.head_dim, CPU)
# Window and sinks in latents, whether positions are the window's.
WINDOWS = [
    (9, 0, False), (9, 3, False), (9, 0, True), (12, 3, True), (12, 6, True), (6, 3, True),
    (3, 0, True),
]  # fmt: skip
windows = pytest.mark.parametrize(("window", "sinks", "positions"), WINDOWS)


def remembers(window: int, sinks: int, positions: bool, **options: object) -> History:
    stream = StreamConfig(
        64, 96, chunk_latents=CHUNK, window_latents=window, sink_latents=sinks,
        window_positions=positions,
    )  # fmt: skip
    size = {"batch": BATCH, "latent_height": HEIGHT, "latent_width": WIDTH}
    return History(CONFIG, stream, **size, **options)  # type: ignore[arg-type]


def caches(window: int, sinks: int, positions: bool) -> KVCache:
    return KVCache(
        CONFIG, batch=BATCH, latent_height=HEIGHT, latent_width=WIDTH, chunk_latents=CHUNK,
        window_latents=window, sink_latents=sinks, window_positions=positions,
    )  # fmt: skip


def drawn(count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of so many chunks, other ones in each layer: [layers, B, T, N, D]."""
    generator = torch.manual_seed(4)
    for _ in range(count):
        q, k, v = torch.randn(3, LAYERS, BATCH, TOKENS, *HEADS, generator=generator)
        yield q, k, v


def seen_by(
    visible: Cached | Remembered | Unrolled, q: Tensor, k: Tensor, v: Tensor, frames: int = CHUNK
) -> Tensor:
    """What each layer attends to, with positions."""
    rope = visible.begin(frames, *PLACE[1:])
    return torch.stack(
        [visible.attend(n, rotate(q[n], rope), rotate(k[n], rope), v[n]) for n in range(LAYERS)]
    )


def of(tokens: Tensor | None, *xs: Tensor) -> list[Tensor]:
    return [x if tokens is None else x[:, :, tokens] for x in xs]


def pruned(tokens: Tensor) -> Reuse:
    return Reuse("attention", torch.empty(0), tokens, fixed_size=False)


@windows
def test_it_shows_what_the_ring_shows(window: int, sinks: int, positions: bool) -> None:
    """Every token and some of them, in every layer, until the ring has rolled twice."""
    history, kv = remembers(window, sinks, positions), caches(window, sinks, positions)
    for n, qkv in enumerate(drawn(2 * window // CHUNK + 2)):
        some = torch.arange(n % TOKENS, TOKENS, 2)
        for tokens in (some, None):
            reuse = None if tokens is None else pruned(tokens)
            ours = seen_by(Remembered(history, reuse), *of(tokens, *qkv))
            theirs = seen_by(Cached(kv, reuse), *of(tokens, *qkv))
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        keeps = history.empty()
        seen_by(Remembered(history, None, keeps), *qkv)
        history.commit(*keeps)
        kv.commit()
        assert history.committed == kv.committed == n + 1
        assert len(history.seen) == min(n + 1, history.slots - 1)
        assert history.moved == (
            CHUNK * max(0, n + 1 - (history.slots - 1)) if positions and sinks else 0
        )


@windows
def test_a_chunk_sees_what_was_there_when_it_came(window: int, sinks: int, positions: bool) -> None:
    """Also when it is computed again, for its gradient, after all the others."""
    history, before = remembers(window, sinks, positions), []
    for qkv in drawn(6):
        visible, keeps = Remembered(history), history.empty()
        before.append((visible, qkv, seen_by(visible, *qkv)))
        seen_by(Remembered(history, None, keeps), *qkv)
        history.commit(*keeps)
    for visible, qkv, first in reversed(before):
        assert torch.equal(seen_by(visible, *qkv), first)


@windows
def test_chunks_at_once_see_what_each_sees_alone(window: int, sinks: int, positions: bool) -> None:
    """All of their tokens, or other ones of each."""
    for prunes in (False, True):
        history, chunks, alone, given = remembers(window, sinks, positions), [], [], []
        for n, qkv in enumerate(drawn(5)):
            tokens = torch.arange(n, TOKENS, 2 + n) if prunes and n else None
            reuse = None if tokens is None else pruned(tokens)
            chunks.append(Remembered(history, reuse))
            given.append(of(tokens, *qkv))
            alone.append(seen_by(Remembered(history, reuse), *given[-1]))
            keeps = history.empty()
            seen_by(Remembered(history, None, keeps), *qkv)
            history.commit(*keeps)
        together = Unrolled(chunks)
        q, k, v = (torch.cat(pieces, dim=2) for pieces in zip(*given, strict=True))
        found = seen_by(together, q, k, v, frames=5 * CHUNK)
        torch.testing.assert_close(found, torch.cat(alone, dim=2), atol=1e-5, rtol=1e-4)
        assert (together.reuse is not None) is prunes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_room_for_a_chunk_is_of_the_type_and_place_that_were_asked_for(dtype: torch.dtype) -> None:
    for device in ("cpu", "meta"):
        keys, values = remembers(12, 3, True, device=device, dtype=dtype).empty()
        for room in (keys, values):
            assert room.shape == (LAYERS, BATCH, TOKENS, *HEADS)
            assert (room.dtype, room.device.type) == (dtype, device)
        assert keys is not values


def test_what_no_later_chunk_sees_is_freed() -> None:
    """But for the sinks and what a chunk that may be computed again saw."""
    history, made = remembers(12, 3, True), list[weakref.ref[Tensor]]()
    for n in range(7):
        if n == 3:
            late = Remembered(history)  # which saw 0, 1 and 2
        keeps = history.empty()
        made.append(weakref.ref(keeps[0]))
        history.commit(*keeps)
        del keeps
    gc.collect()
    assert [ref() is not None for ref in made] == [True, True, True, False, False, True, True]
    del late
    gc.collect()
    assert [ref() is not None for ref in made] == [True, *[False] * 4, True, True]


def test_latents_that_do_not_fit_are_refused() -> None:
    history = remembers(12, 3, True)
    for frames, height, width in ((4, *GRID), (CHUNK, GRID[0] + 1, GRID[1]), (CHUNK, *GRID[::-1])):
        with pytest.raises(ValueError, match=f"{frames} latents of {height}x{width} tokens .* 2x3"):
            Remembered(history).begin(frames, height, width, CONFIG.head_dim, CPU)
    with pytest.raises(ValueError, match="2 chunks of 3 latents, the input has 3"):
        Unrolled([Remembered(history)] * 2).begin(*PLACE)
