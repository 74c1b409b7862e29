"""The ring against plain descriptions of what a stream may see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling.config import TransformerConfig
from modeling.diffusion.attention import chunk_causal, teacher_forcing
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.rope import rotate
from modeling.diffusion.transformer import Transformer
from modeling.streaming.kv_cache import Cached, KVCache

CONFIG = TransformerConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4
)
CHUNK, HEIGHT, WIDTH = 3, 4, 6


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)  # the real one starts at zero
    torch.nn.init.normal_(model.patch_embedding.weight, std=0.1)
    return model.requires_grad_(False)


def cache(window: int, sinks: int = 0, **options: object) -> KVCache:
    return KVCache(
        CONFIG,
        batch=1,
        latent_height=HEIGHT,
        latent_width=WIDTH,
        chunk_latents=CHUNK,
        window_latents=window,
        sink_latents=sinks,
        **options,  # type: ignore[arg-type]
    )


def test_all_of_a_cache_is_where_and_what_it_is_asked_to_be() -> None:
    made = cache(6, 3, device="meta", dtype=torch.bfloat16)
    assert {x.device.type for x in (made.k, made.v, made.sink_k, *made.rope)} == {"meta"}
    assert {x.dtype for x in (made.k, made.v, made.sink_k)} == {torch.bfloat16}
    assert made.k.shape == made.v.shape == (2, 1, 2 * CHUNK * 6, 2, 24)
    assert made.sink_k.shape == (2, 1, CHUNK * 6, 2, 24)


def latents(frames: int, seed: int = 1) -> Tensor:
    return torch.randn(2, 1, frames, 16, HEIGHT, WIDTH, generator=torch.manual_seed(seed))


def stream(model: Transformer, kv: KVCache, clip: Tensor) -> Tensor:
    """Chunk after chunk at one timestep; every chunk stays in the cache as it was seen."""
    text, outputs = torch.ones(1, 4, 8), []
    for first in range(0, clip.shape[2], CHUNK):
        noisy, source = clip[:, :, first : first + CHUNK]
        outputs.append(model(noisy, source, torch.tensor([700.0]), text, Cached(kv)))
        kv.commit()
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("window_positions", [True, False])
def test_cached_chunks_equal_one_masked_forward(
    transformer: Transformer, window_positions: bool
) -> None:
    clip = latents(21)
    whole = transformer(*clip, torch.tensor([700.0]), torch.ones(1, 4, 8), chunk_causal(21, CHUNK))
    chunks = stream(transformer, cache(21, window_positions=window_positions), clip)
    torch.testing.assert_close(chunks, whole, atol=1e-5, rtol=1e-5)


def test_window_positions_equal_absolute_ones_within_the_window(transformer: Transformer) -> None:
    clip = latents(12)
    relative = stream(transformer, cache(12, 3, window_positions=True), clip)
    absolute = stream(transformer, cache(12, 3, window_positions=False), clip)
    assert torch.equal(relative, absolute)


class ShiftedWindow:
    """The same window kept as a list that is cut and shifted, with float64 attention."""

    def __init__(self, slots: int, sink_slots: int, window_positions: bool) -> None:
        self.slots, self.sink_slots = slots, sink_slots
        self.window_positions = window_positions
        self.chunks: list[tuple[int, Tensor, Tensor]] = []  # position, raw k, v

    def attend(
        self, position: int, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """The chunk at `position` joins the window; with `kept`, [K], only these tokens of it are
        there, as in a pruned step, and it does not join yet."""
        seen = [*self.chunks, (position, k, v)]
        places = [p for p, _, _ in seen]
        if self.window_positions:
            places = [CHUNK * i for i in range(len(seen))]
        keys = [self._rotate(k, p) for p, (_, k, _) in zip(places, seen, strict=True)]
        values = [v.double() for _, _, v in seen]
        q = self._rotate(q, places[-1])
        if kept is not None:
            q, keys[-1], values[-1] = (x[:, kept] for x in (q, keys[-1], values[-1]))
        weights = torch.einsum("btnd,bsnd->bnts", q, torch.cat(keys, dim=1)) / CONFIG.head_dim**0.5
        out = torch.einsum("bnts,bsnd->btnd", weights.softmax(-1), torch.cat(values, dim=1))
        if kept is None:
            self.chunks = seen
            if len(self.chunks) == self.slots:
                del self.chunks[self.sink_slots]
        return out

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        space = CONFIG.head_dim // 2 // 3
        sizes = [CONFIG.head_dim // 2 - 2 * space, space, space]
        f, h, w = torch.meshgrid(
            torch.arange(position, position + CHUNK),
            torch.arange(HEIGHT // 2),
            torch.arange(WIDTH // 2),
            indexing="ij",
        )
        angles = [
            places.flatten().double()[:, None] * 10000.0 ** (-torch.arange(n).double() / n)
            for places, n in zip((f, h, w), sizes, strict=True)
        ]
        turn = torch.polar(torch.ones(1).double(), torch.cat(angles, dim=1))[:, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)


@pytest.mark.parametrize(
    ("window", "sinks", "window_positions", "frames"),
    [
        (9, 0, False, 30),
        (9, 3, False, 30),
        (12, 3, True, 45),
        (12, 6, True, 45),
        (6, 3, True, 30),  # sinks and the current chunk only
        (3, 0, True, 12),  # the current chunk only
        (12, 3, True, 801),  # positions never run out, and nothing drifts
    ],
)
def test_ring_equals_a_shifted_window(
    window: int, sinks: int, window_positions: bool, frames: int
) -> None:
    kv = cache(window, sinks, window_positions=window_positions)
    plain = ShiftedWindow(window // CHUNK, sinks // CHUNK, window_positions)
    generator = torch.manual_seed(3)
    tokens = CHUNK * HEIGHT * WIDTH // 4
    for position in range(0, frames, CHUNK):
        q, k, v = torch.randn(3, 1, tokens, CONFIG.num_heads, CONFIG.head_dim, generator=generator)
        some = torch.randperm(tokens, generator=generator)[: 1 + position % tokens].sort().values
        for kept in (some, None):  # a pruned step, then the refresh
            visible = Cached(
                kv, kept if kept is None else Reuse("attention", k, kept, fixed_size=False)
            )
            rope = visible.begin(CHUNK, HEIGHT // 2, WIDTH // 2, CONFIG.head_dim, q.device)
            ours = [x if kept is None else x[:, kept] for x in (q, k, v)]
            turned = rotate(ours[0], rope), rotate(ours[1], rope)
            theirs = plain.attend(position, q, k, v, kept)
            for layer in range(CONFIG.num_layers):
                out = visible.attend(layer, *turned, ours[2])
                assert (out - theirs).norm() / theirs.norm() < 1e-5
        kv.commit()


def test_state_restores_bit_for_bit(transformer: Transformer) -> None:
    kv, other = cache(12, 3), cache(12, 3)
    stream(transformer, kv, latents(18))
    other.load_state_dict(kv.state_dict())
    clip = latents(9, seed=9)
    assert torch.equal(stream(transformer, kv, clip), stream(transformer, other, clip))


def test_state_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit a cache of"):
        cache(12, 3).load_state_dict(
            {**cache(12, 3).state_dict(), "k": torch.zeros(1, 1, 0, 2, 24)}
        )


def test_impossible_windows() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        cache(10)
    with pytest.raises(ValueError, match="does not hold 6 sinks"):
        cache(6, 6)


@pytest.mark.parametrize(
    ("window", "sinks", "window_positions"),
    [(9, 3, True), (12, 6, True), (9, 0, True), (6, 3, True), (9, 3, False), (21, 3, True)],
)
def test_teacher_forcing_with_a_window_is_what_a_stream_of_clean_chunks_sees(
    transformer: Transformer, window: int, sinks: int, window_positions: bool
) -> None:
    frames, text = 21, torch.ones(1, 4, 8)
    clean, source = latents(frames)
    noisy = latents(frames, seed=2)[0]
    kv = cache(window, sinks, window_positions=window_positions)
    chunks = []
    for first in range(0, frames, CHUNK):
        piece = slice(first, first + CHUNK)
        at_level = (noisy[:, piece], source[:, piece], torch.tensor([700.0]))
        chunks.append(transformer(*at_level, text, Cached(kv)))
        transformer(clean[:, piece], source[:, piece], torch.zeros(1), text, Cached(kv))
        kv.commit()
    visible = teacher_forcing(
        frames, CHUNK, window=window, sinks=sinks, window_positions=window_positions
    )
    timestep = torch.cat([torch.zeros(1, frames), torch.full((1, frames), 700.0)], dim=1)
    at_once = (torch.cat([clean, noisy], dim=1), torch.cat([source, source], dim=1), timestep)
    out = transformer(*at_once, text, visible)[:, frames:]
    torch.testing.assert_close(out, torch.cat(chunks, dim=1), atol=1e-5, rtol=1e-5)
    full = transformer(*at_once, text, teacher_forcing(frames, CHUNK))[:, frames:]
    assert ((out - full).abs().amax(dim=(0, 2, 3, 4)) > 1e-4).tolist() == [
        at >= window for at in range(frames)
    ]
    stacked = teacher_forcing(frames, CHUNK, window=window, sinks=sinks)
    assert stacked.pairs == 2 * CHUNK * sum(
        min(end, window) for end in range(CHUNK, frames + 1, CHUNK)
    )


def test_a_saved_state_stays_as_it_was_while_the_stream_goes_on(transformer: Transformer) -> None:
    kv = cache(9, 3)
    stream(transformer, kv, latents(9))
    state = kv.state_dict()
    before = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    after = stream(transformer, kv, latents(9, seed=2))
    for name, value in before.items():
        assert torch.equal(state[name], value), name  # type: ignore[arg-type]
    kv.load_state_dict(state)
    assert torch.equal(stream(transformer, kv, latents(9, seed=2)), after)
