"""Where streams share graphs: what each lays at the fixed places, and takes from there.

A CPU has no graphs. Here one is its function, run again on the same places; like a graph's capture
it runs once before, and like a replay it overwrites what other graphs gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.config import MaskCacheConfig, TransformerConfig, VaeConfig
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.transformer import TextKV, Transformer
from modeling.streaming.forward import PlainForward, StreamForward
from modeling.streaming.kv_cache import Cached, KVCache
from modeling.streaming.mask_cache import MaskCache
from modeling.vae.build import build_vae

if torch.cuda.is_available():
    pytest.skip("graphs themselves run here: test_accelerate", allow_module_level=True)
pytest.importorskip("triton", reason="Triton exists for Linux only")

from modeling.gpu import graphs

pytestmark = pytest.mark.usefixtures("no_gradients", "no_captures")
SIZES = TransformerConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4
)
STEPS = (1000.0, 750.0, 500.0, 250.0)
read: list[int] = []  # first tokens of chunks that the network was run on, while a graph runs


@pytest.fixture
def no_captures(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Graphs that are functions; an item for each that was made."""
    made, given = [], []

    def captured(function: Callable[[], Any]) -> Callable[[], Any]:
        read.clear()
        function()
        made.append(None)
        fixed = list(read)

        def replay() -> Any:
            read.clear()
            found = function()
            assert read == fixed, "a graph would have read another part of the window"
            for other in given:
                other.fill_(math.nan)
            given[:] = [] if found is None else [found]
            return found

        return replay

    monkeypatch.setattr(graphs, "captured", captured)
    return made


class PlainNetwork:
    """What `FusedTransformer` computes, without its kernels."""

    def __init__(self, transformer: Transformer) -> None:
        self._net = transformer

    def __call__(
        self,
        noisy: Tensor,
        source: Tensor,
        timestep: Tensor,
        text: TextKV,
        cache: KVCache,
        reuse: Reuse | None,
    ) -> Tensor:
        read.append(cache.start)
        velocity: Tensor = self._net(noisy, source, timestep, text, Cached(cache, reuse))
        return velocity

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV, cache: KVCache) -> None:
        self(edited, source, edited.new_zeros(1), text, cache, None)


class Play:
    """A stream of random latents by one prompt: its velocities, chunk by chunk."""

    def __init__(
        self, network: Transformer, on: Callable[[KVCache], StreamForward], seed: int, **mask: Any
    ) -> None:
        width = 4 if seed % 2 else 6
        shape = {"chunk_latents": 2, "latent_height": 4, "latent_width": width}
        self.cache = KVCache(SIZES, batch=1, window_latents=8, sink_latents=2, **shape)  # type: ignore[arg-type]
        self.cache.turn = turned
        self._forward = on(self.cache)
        self.cache.turn = turned  # a GPU's kernel rounds as a GPU does
        config = MaskCacheConfig(keep_ratio=0.4, **mask)
        self._mask = MaskCache(config, SIZES, **shape)  # type: ignore[arg-type]
        self._draw = torch.Generator().manual_seed(seed)
        self._text = network.prepare_text(torch.randn(1, 4, 8, generator=self._draw))
        self._size = (2, 1, 2, 16, 4, width)

    def chunk(self, between: Callable[[], None] = lambda: None) -> list[Tensor]:
        noisy, source = torch.randn(self._size, generator=self._draw)
        found = []
        for step, t in enumerate(STEPS):
            between()
            timestep, reuse = torch.tensor([t]), self._mask.reuse(step)
            found.append(self._forward(noisy, source, timestep, self._text, reuse).clone())
        between()
        self._forward.refresh(found[-1], source, self._text)
        self._mask.observe(found[-1], source)
        return [*found, self.cache.k[:, :, : self.cache.start].clone()]


def turned(x: Tensor, rope: Any, out: Tensor) -> None:
    from modeling.diffusion.rope import turn

    turn(x, rope, out)


def network() -> Transformer:
    plain = Transformer(SIZES)
    for parameter in plain.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5)
    return plain.requires_grad_(False)


@pytest.mark.parametrize(
    "mask",
    [
        {"policy": "budget", "scope": "block", "pruned_steps": (1, 2, 3)},
        {"policy": "budget", "scope": "attention", "pruned_steps": (1, 2)},
        {"policy": "published", "scope": "feedforward", "pruned_steps": (1, 3)},
    ],
    ids=lambda mask: mask["scope"],
)
def test_streams_in_turns_get_what_each_gets_alone(
    mask: dict[str, Any], no_captures: list[None]
) -> None:
    """Of two sizes, begun one after the other, with the desk full of rubbish between any two
    forwards; and who comes later finds all graphs made."""
    plain = network()
    desk = graphs.Desk(PlainNetwork(plain))

    def rubbish() -> None:  # of another stream, which would be laid over
        desk.laid = None
        for place in desk._places.values():
            for tensor in (place.cache.k, place.cache.v, *place.cache.rope, *place.text):
                tensor.fill_(math.nan)
            for reuse in place._reuses.values():
                reuse.outputs.fill_(math.nan)

    def at_desk(cache: KVCache) -> StreamForward:
        return graphs.GraphedForward(desk, cache)

    def alone(cache: KVCache) -> StreamForward:
        return PlainForward(plain, cache)

    desked = [Play(plain, at_desk, seed, **mask) for seed in range(3)]
    wanted = [Play(plain, alone, seed, **mask) for seed in range(3)]
    for turn in range(6):
        for number, (here, there) in enumerate(zip(desked, wanted, strict=True)):
            if turn < number or (number == 0 and turn > 4):
                continue  # it has not begun, or is over
            for found, expected in zip(here.chunk(rubbish), there.chunk(), strict=True):
                assert torch.equal(found, expected), (turn, number)
    made = len(no_captures)
    late = [Play(plain, on, 4, **mask) for on in (at_desk, alone)]
    for _ in range(4):
        for found, expected in zip(*(play.chunk() for play in late), strict=True):
            assert torch.equal(found, expected)
    assert len(no_captures) == made


def test_a_stream_lays_its_history_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    laid: list[KVCache] = []
    copied = KVCache.copy_
    monkeypatch.setattr(
        KVCache, "copy_", lambda mine, theirs: (laid.append(theirs), copied(mine, theirs))
    )
    plain = network()
    desk = graphs.Desk(PlainNetwork(plain))
    plays = [Play(plain, lambda cache: graphs.GraphedForward(desk, cache), 0) for _ in range(2)]
    for play in (plays[0], plays[1], plays[0]):
        play.chunk()
    assert laid == [plays[0].cache, plays[1].cache, plays[0].cache]


def test_another_stream_of_the_same_prompt_may_come_between_two_steps() -> None:
    plain = network()
    desk = graphs.Desk(PlainNetwork(plain))
    here, other = (Play(plain, lambda cache: graphs.GraphedForward(desk, cache), 0) for _ in "ab")
    there = Play(plain, lambda cache: PlainForward(plain, cache), 0)
    other._text = here._text
    latents = torch.randn(2, 1, 2, 16, 4, 6)
    for _ in range(3):
        other._forward.refresh(*latents, other._text)

    def between() -> None:
        other._forward(*latents, torch.tensor([500.0]), other._text, None)

    for _ in range(2):
        for found, expected in zip(here.chunk(between), there.chunk(), strict=True):
            assert torch.equal(found, expected)


def test_another_prompt_is_read_at_once() -> None:
    """Also where the chunk before it was not made history."""
    plain = network()
    desk = graphs.Desk(PlainNetwork(plain))
    plays = [
        Play(plain, on, 0)
        for on in (
            lambda cache: graphs.GraphedForward(desk, cache),
            lambda cache: PlainForward(plain, cache),
        )
    ]
    for prompt in range(3):
        text, cut_off = plain.prepare_text(torch.randn(1, 4, 8)), torch.randn(2, 1, 2, 16, 4, 6)
        for play in plays:
            play._forward(*cut_off, torch.tensor([500.0]), play._text, None)
            play._text = text
        for found, expected in zip(*(play.chunk() for play in plays), strict=True):
            assert torch.equal(found, expected), prompt


def test_wide_and_upright_streams_of_as_many_tokens_have_graphs_of_their_own() -> None:
    plain = network()
    desk = graphs.Desk(PlainNetwork(plain))
    text = plain.prepare_text(torch.randn(1, 4, 8))
    for height, width in ((4, 6), (6, 4)):
        shape = {"chunk_latents": 2, "latent_height": height, "latent_width": width}
        caches = [KVCache(SIZES, batch=1, window_latents=4, **shape) for _ in range(2)]
        given = (*torch.randn(2, 1, 2, 16, height, width), torch.tensor([500.0]), text, None)
        found = graphs.GraphedForward(desk, caches[0])(*given)
        assert torch.equal(found, PlainForward(plain, caches[1])(*given))


def test_large_frames_are_large_to_both_passes(
    monkeypatch: pytest.MonkeyPatch, no_captures: list[None]
) -> None:
    """A latent cell is 8 x 8 pixels."""
    vae = build_vae(VaeConfig(kind="tiny", widths=(4, 4, 4, 4))).requires_grad_(False)
    graphs.graph_passes(vae)
    for large, captures in ((32 * 16, 0), (32 * 16 + 1, 2)):
        monkeypatch.setattr(graphs, "LARGE", large)
        _, coding = vae.encode(torch.zeros(1, 1, 3, 32, 16))
        _, decoding = vae.decode(torch.zeros(1, 1, 16, 4, 2))
        assert not no_captures  # of first passes
        vae.encode(torch.zeros(1, 4, 3, 32, 16), coding)
        vae.decode(torch.zeros(1, 1, 16, 4, 2), decoding)
        assert len(no_captures) == captures


@pytest.mark.parametrize(
    "config",
    [
        VaeConfig(kind="wan", base_dim=2),
        VaeConfig(kind="tiny", widths=(8, 8, 8, 8)),
        VaeConfig(kind="folded", widths=(8, 8), depths=(1, 1, 1, 1)),
    ],
    ids=lambda config: config.kind,
)
def test_vae_passes_in_turns(config: VaeConfig, no_captures: list[None]) -> None:
    """Three clips of two sizes in turns: the bits of the passes themselves, and a state may be gone
    on from twice."""
    vae = build_vae(config).requires_grad_(False)
    clips = [torch.rand(1, 25, 3, 16, width) * 2 - 1 for width in (16, 24, 16)]

    def play(order: list[int]) -> list[Tensor]:
        states: dict[int, tuple[Any, Any]] = {}
        found: dict[int, list[Tensor]] = {}
        for number in order:
            begun, (seen, made) = number in states, states.get(number, (None, None))
            at = sum(x.shape[1] for x in found.get(number, []) if x.shape[2] == 3)
            frames = clips[number][:, at : at + (12 if begun else 9)]
            latents, seen_now = vae.encode(frames, seen)
            for _ in range(2):
                again, made_now = vae.decode(latents, made)
                twice, _ = vae.encode(frames, seen)
            states[number] = seen_now, made_now
            found[number] = [*found.get(number, []), latents, again, twice]
        caches = [c for state in states.values() for s in state for c in s.caches]
        return [x for number in sorted(found) for x in found[number]] + caches

    order = [0, 2, 0, 1, 2]
    wanted = play(order)
    graphs.graph_passes(vae)
    got = play(order)
    assert no_captures
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)


def adding(x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A pass whose result is the sum of all that came."""
    total = caches[0] + x.sum()
    return total, [total]


def test_a_state_is_laid_where_a_pass_of_another_length_reads_it(no_captures: list[None]) -> None:
    """Two lengths of one size lie in other memory, where a larger size came between them."""
    graphed = graphs.GraphedPass(adding, 1)
    small, large = torch.zeros(2, 2), torch.zeros(64, 64)
    graphed(torch.ones(1, 3, 8, 8), [small])
    graphed(torch.ones(1, 3, 16, 16), [large])
    graphed(torch.ones(1, 2, 8, 8), [small])
    _, state = graphed(torch.ones(1, 3, 8, 8), [small])
    assert torch.equal(graphed(torch.ones(1, 2, 8, 8), state)[0], small + (3 + 2) * 64)
    assert len(no_captures) == 3


def test_a_capture_that_fails_leaves_others_their_states(no_captures: list[None]) -> None:
    def run(x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if len(x) == 2:
            caches[0].fill_(math.nan)  # as where memory ends in the middle of it
            raise MemoryError
        return adding(x, caches)

    graphed, x = graphs.GraphedPass(run, 1), torch.ones(1, 8, 8)
    _, state = graphed(x, [torch.zeros(2, 2)])
    with pytest.raises(MemoryError):
        graphed(torch.ones(2, 8, 8), [torch.ones(2, 2)])
    assert torch.equal(graphed(x, state)[0], torch.full((2, 2), 2.0 * 64))


def test_large_frames_and_first_passes_run_as_they_are(no_captures: list[None]) -> None:
    ran: list[torch.Size] = []

    def run(x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        ran.append(x.shape)
        return x + sum(cache.sum() for cache in caches), [x.clone()]

    graphed = graphs.GraphedPass(run, 64)
    for height, captures in ((64, 0), (63, 1)):
        x = torch.ones(1, height, 64)
        assert torch.equal(graphed(x, [])[0], x)
        assert torch.equal(graphed(x, [x])[0], x * (1 + x.sum()))
        assert len(no_captures) == captures


def test_sizes_share_memory_and_the_longest_unused_graphs_are_let_go() -> None:
    plain = network()
    desk = graphs.Desk(PlainNetwork(plain))
    for seed in (0, 1):
        Play(plain, lambda cache: graphs.GraphedForward(desk, cache), seed).chunk()
    large, small = desk._places.values()
    assert large.cache.k.data_ptr() == small.cache.k.data_ptr()
    ends = [t.data_ptr() + 4 * t.numel() for t in (large.cache.k, large.cache.v, *large.text)]
    begins = [t.data_ptr() for t in (large.cache.k, large.cache.v, *large.text)]
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
    known: dict[int, int] = {}
    for key in (*range(graphs.KEPT), 0, graphs.KEPT):
        assert graphs._known(known, key, lambda key=key: key) == key  # type: ignore[misc]
    assert 0 in known
    assert 1 not in known
    assert len(known) == graphs.KEPT
