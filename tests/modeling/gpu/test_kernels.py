"""The GPU's arithmetic without a GPU: Triton's interpreter runs the kernels, at tiny sizes.

Each kernel against PyTorch's own operations, then the fused networks, which are made of them,
against the plain ones. Graphs and the convolution in CUDA stay for GPUs (`test_accelerate`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling.config import MaskCacheConfig, Scope, TransformerConfig, VaeConfig
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.rope import Rope, rope_table, rotate, time_shift
from modeling.diffusion.transformer import TextKV, Transformer
from modeling.streaming.forward import PlainForward
from modeling.streaming.kv_cache import KVCache
from modeling.streaming.mask_cache import MaskCache
from modeling.vae.build import build_vae
from modeling.vae.wan import WanVae

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run here", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton exists for Linux only")

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # of float32; sums are made in another order
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    import modeling.gpu.kernels.heads
    import modeling.gpu.kernels.rows
    import modeling.gpu.kernels.vae

    return modeling.gpu.kernels


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_a_linear_layer_in_8_bits_scales_its_rows_and_its_outputs(kernels: ModuleType) -> None:
    from modeling.gpu.transformer import Fp8Linear

    rows, outputs = torch.logspace(-3, 1, 5)[:, None], torch.logspace(-2, 2, 48)
    weight, bias = torch.randn(48, 32), torch.randn(48)
    x = kernels.rows.Fp8(torch.randn(5, 32).to(kernels.rows.FP8), rows)
    found = Fp8Linear(weight * outputs[:, None], bias)(x) - bias
    expected = F.linear(x.values.float(), weight)
    torch.testing.assert_close(found / (rows * outputs), expected, atol=0.8, rtol=0)
    assert (found / (rows * outputs) - expected).square().mean() < 0.03  # of 32


@pytest.mark.parametrize("tokens", [0, 1, 64, 127, 200])
def test_few_rows_in_8_bits_are_multiplied_among_more(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """cuBLAS refuses products of few rows with a wide layer; a mask may keep that few."""
    from modeling.gpu.transformer import Fp8Linear

    asked, product = [], F.scaled_mm

    def recorded(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(len(values))
        return product(values, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_mm", recorded)
    layer = Fp8Linear(torch.randn(16, 32), torch.randn(16))
    values, scales = torch.randn(200, 32).to(kernels.rows.FP8), torch.rand(200, 1) + 0.5
    found = layer(kernels.rows.Fp8(values[:tokens], scales[:tokens]))
    assert asked == ([] if tokens == 0 else [max(tokens, 128)])
    wanted = layer(kernels.rows.Fp8(values, scales))[:tokens]
    assert torch.equal(found, wanted)


@DTYPES
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("adds", ["nothing", "all", "gated"])
def test_add_norm(kernels: ModuleType, adds: str, modulated: bool, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 5, 24).to(dtype)
    gate, scale, shift = torch.randn(3, 24).to(dtype)
    total, normed = kernels.rows.add_norm(
        x,
        None if adds == "nothing" else y,
        gate if adds == "gated" else None,
        scale,
        shift,
        modulated=modulated,
        eps=0.01,
    )
    added = {"nothing": 0, "all": y, "gated": y.float() * gate.float()}[adds]
    wanted = (x.float() + added).to(dtype)
    assert torch.equal(total, wanted)
    factor = scale.float() + 1 if modulated else scale.float()
    wanted = F.layer_norm(wanted.float(), (24,), eps=0.01) * factor + shift.float()
    torch.testing.assert_close(normed, wanted.to(dtype), **(CLOSE if dtype.itemsize == 4 else {}))


def test_rows_in_eight_bits(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's largest number becomes the type's largest, 448.

    The interpreter's own eight bits lose carries, so the numbers are kept in 32 here.
    """
    monkeypatch.setattr(kernels.rows, "FP8", torch.float32)
    x = torch.randn(4, 20) * torch.tensor([[1e-3], [1.0], [1e3], [0.0]])
    scale, shift = torch.randn(2, 20)
    named = {"modulated": False, "eps": 1e-6}
    _, plain = kernels.rows.add_norm(x, None, None, scale, shift, **named)
    _, rows = kernels.rows.add_norm(x, None, None, scale, shift, fp8=True, **named)
    gelu = kernels.rows.gelu_fp8(x)
    for found, wanted in ((rows, plain), (gelu, F.gelu(x, approximate="tanh"))):
        largest = wanted.abs().amax(1, keepdim=True)
        torch.testing.assert_close(found.scales, largest.clamp_min(1e-12) / 448)
        torch.testing.assert_close(found.values * found.scales, wanted, atol=1e-6, rtol=1e-4)
    chosen = rows.rows(torch.tensor([2, 0]))
    assert torch.equal(chosen.values, rows.values[[2, 0]])
    assert torch.equal(chosen.scales, rows.scales[[2, 0]])


@DTYPES
@pytest.mark.parametrize("listed", [True, False])
def test_norm_rotate(kernels: ModuleType, listed: bool, dtype: torch.dtype) -> None:
    heads, size = 3, 8
    dim, chosen = heads * size, torch.tensor([1, 4, 5])
    rope = rope_table(torch.arange(4, 6), 1, 3, size)  # of 6 tokens
    tokens = chosen if listed else None
    count = 3 if listed else 6
    qkv, weights = torch.randn(count, 3 * dim).to(dtype), torch.rand(2, dim).to(dtype) + 0.5
    k, v = torch.zeros(2, count + 1, dim, dtype=dtype)  # a cache, of which the rest stays
    q = kernels.heads.norm_rotate(qkv, weights, rope, tokens, k, v, 0.01)
    wanted = qkv.split(dim, dim=1)
    turns = rope.select(chosen) if listed else rope
    for found, x, weight in ((q, wanted[0], weights[0]), (k[:count], wanted[1], weights[1])):
        normed = F.rms_norm(x.float(), (dim,), weight.float(), 0.01).to(dtype)
        turned = rotate(normed.unflatten(-1, (heads, size)), turns).flatten(1)
        torch.testing.assert_close(found, turned, **(CLOSE if dtype.itemsize == 4 else {}))
    assert torch.equal(v[:count], wanted[2])
    assert not k[count:].any()
    assert not v[count:].any()


def test_turn(kernels: ModuleType) -> None:
    """The first tokens of something longer, into the first of something longer still."""
    held = torch.randn(2, 2, 5, 3, 8)
    out = torch.zeros(2, 2, 7, 3, 8)
    rope = time_shift(5, 8, held.device)
    kernels.heads.turn(held[:, :, :4], rope, out)
    torch.testing.assert_close(out[:, :, :4], rotate(held[:, :, :4], rope), **CLOSE)
    assert not out[:, :, 4:].any()


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_merge_attention(kernels: ModuleType, splits: int) -> None:
    """Attention to groups of keys, made one, is attention to all."""
    q, (k, v) = torch.randn(5, 3, 6), torch.randn(2, 12, 3, 6)
    parts, lse = [], []
    for keys, values in zip(k.chunk(splits), v.chunk(splits), strict=True):
        logits = 3 * torch.einsum("qnd,knd->nqk", q, keys)
        parts.append(torch.einsum("nqk,knd->qnd", logits.softmax(-1), values))
        lse.append(logits.logsumexp(-1))
    merged = kernels.heads.merge_attention(torch.stack(parts), torch.stack(lse))
    weights = (3 * torch.einsum("qnd,knd->nqk", q, k)).softmax(-1)
    torch.testing.assert_close(merged, torch.einsum("nqk,knd->qnd", weights, v), **CLOSE)


@pytest.mark.parametrize("layout", ["frames", "padded", "stacked"])
@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize(
    ("has_past", "has_bias", "has_residual", "phases", "keep"),
    [
        (False, False, False, False, False),
        (True, True, False, False, True),
        (True, True, True, False, True),
        (True, True, False, True, True),
        (False, True, False, True, False),
    ],
)
def test_norm_silu(
    kernels: ModuleType,
    layout: Literal["frames", "padded", "stacked"],
    frames: int,
    has_past: bool,
    has_bias: bool,
    has_residual: bool,
    phases: bool,
    keep: bool,
) -> None:
    batch, height, width, channels = 2, 4, 6, 5
    if phases:
        given = torch.randn(batch, frames, height // 2 + 1, width // 2 + 1, 4, channels)
        y = torch.empty(batch, frames, height, width, channels)
        for h in range(height):  # as `vae.phase_weights` says
            for w in range(width):
                place = (h // 2 + h % 2, w // 2 + w % 2, 2 * (h % 2) + w % 2)
                y[:, :, h, w] = given[:, :, *place]
        given = given.flatten(-2)
    else:
        given = y = torch.randn(batch, frames, height, width, channels)
    gamma, bias = torch.randn(2, channels)
    past = torch.randn(batch, 2, height, width, channels) if has_past else None
    residual = torch.randn_like(y) if has_residual else None
    x, seen, tail = kernels.vae.norm_silu(
        given,
        gamma,
        past,
        bias=bias if has_bias else None,
        residual=residual,
        phases=phases,
        layout=layout,
        keep=keep,
    )
    total = y + (bias if has_bias else 0) + (0 if residual is None else residual)
    made = F.silu(F.normalize(total, dim=-1) * channels**0.5 * gamma)
    before = torch.zeros(batch, 2, height, width, channels) if past is None else past
    behind = torch.cat([before, made], dim=1)
    wanted = {
        "frames": made,
        "padded": behind,
        "stacked": torch.cat([behind[:, i : i + frames] for i in range(3)], dim=-1),
    }[layout]
    torch.testing.assert_close(seen, wanted, **CLOSE)
    torch.testing.assert_close(tail, behind[:, -2:], **CLOSE)
    assert (x is not None) == keep
    if x is not None:
        torch.testing.assert_close(x, total, **CLOSE)


@DTYPES
def test_add_bias_residual(kernels: ModuleType, dtype: torch.dtype) -> None:
    """More than one block of 2048 numbers; rounded after each sum, as the plain path does."""
    y, residual = torch.randn(2, 2, 250, 5).to(dtype)
    bias = torch.randn(5).to(dtype)
    assert torch.equal(kernels.vae.add_bias_residual(y, bias, residual), y + bias + residual)


SIZES = TransformerConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4
)
CHUNK, HEIGHT, WIDTH = 2, 2, 6


class FusedForward:
    """What `GraphedForward` runs, without a graph."""

    def __init__(self, network: Any, cache: KVCache) -> None:
        from modeling.gpu.kernels.heads import turn

        self._network, self._cache = network, cache
        cache.turn = turn

    def __call__(
        self, noisy: Tensor, source: Tensor, timestep: Tensor, text: TextKV, reuse: Reuse | None
    ) -> Tensor:
        velocity: Tensor = self._network(noisy, source, timestep, text, self._cache, reuse)
        return velocity

    def refresh(self, edited: Tensor, source: Tensor, text: TextKV) -> None:
        self._network.refresh(edited, source, text, self._cache)
        self._cache.commit()


@pytest.mark.parametrize(
    ("scope", "policy"),
    [("attention", "published"), ("feedforward", "budget"), ("block", "budget")],
)
def test_transformer(scope: Scope, policy: Literal["budget", "published"]) -> None:
    """Dense, storing, pruned and refresh forwards while the window fills, is full and rolls."""
    from modeling.gpu.transformer import FusedTransformer

    plain_network = Transformer(SIZES)
    for parameter in plain_network.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5)
    for block in plain_network.layers():
        block.ffn[1] = nn.GELU()  # what the fused product computes on a CPU; on a GPU it is tanh's
    plain_network.requires_grad_(False)
    shape = {"chunk_latents": CHUNK, "latent_height": HEIGHT, "latent_width": WIDTH}
    caches = [
        KVCache(SIZES, batch=1, window_latents=2 * CHUNK, sink_latents=CHUNK, **shape)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    plain = PlainForward(plain_network, caches[0])
    fused = FusedForward(FusedTransformer(deepcopy(plain_network)), caches[1])
    config = MaskCacheConfig(policy=policy, scope=scope, keep_ratio=0.5, pruned_steps=(1,))
    masks = [MaskCache(config, SIZES, **shape) for _ in range(2)]  # type: ignore[arg-type]
    text = plain_network.prepare_text(torch.randn(1, 3, 8))
    for _ in range(3):
        noisy, source = torch.randn(2, 1, CHUNK, 16, HEIGHT, WIDTH)
        for step, t in enumerate((1000.0, 700.0)):
            wanted, found = (
                forward(noisy, source, torch.tensor([t]), text, mask.reuse(step))
                for forward, mask in zip((plain, fused), masks, strict=True)
            )
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-4)
        for forward in (plain, fused):
            forward.refresh(noisy, source, text)
        for mask in masks:
            mask.observe(noisy, source)
        used = caches[0].start
        for ours, theirs in ((caches[1].k, caches[0].k), (caches[1].v, caches[0].v)):
            torch.testing.assert_close(ours[:, :, :used], theirs[:, :, :used], **CLOSE)


def test_wan_vae() -> None:
    """Whole clips and pieces, with the states of the plain passes."""
    from modeling.gpu.vae import fuse

    plain = build_vae(VaeConfig("wan", base_dim=4))
    for name, parameter in plain.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1:
            parameter.normal_(std=0.2)
    plain.requires_grad_(False)
    fused = deepcopy(plain)
    assert isinstance(fused, WanVae)
    fuse(fused)
    pixels, latents = torch.rand(1, 5, 3, 8, 16) * 2 - 1, torch.randn(1, 2, 16, 1, 2)
    for name, x in (("encode", pixels), ("decode", latents)):
        wanted, state = getattr(plain, name)(x)
        found, found_state = getattr(fused, name)(x)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(found_state.caches, state.caches, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source_channels", [0, 16])
def test_a_model_is_rehearsed_with_a_source_if_it_has_one(source_channels: int) -> None:
    from modeling.gpu.rehearsal import parts

    network = Transformer(replace(SIZES, source_channels=source_channels))
    sources: list[bool] = []

    def fused(noisy: Tensor, source: Tensor | None, *rest: object) -> None:
        sources.append(source is not None)

    nothing: Any = None
    parts(network, fused, nothing)[2]()  # type: ignore[arg-type]
    assert sources == 2 * [source_channels > 0]


def test_a_rehearsal_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling.gpu import rehearsal

    ran: list[bool] = []

    def works() -> None:
        ran.append(torch.is_grad_enabled())

    def fails() -> None:
        raise RuntimeError("no compiler is here")

    nothing: Any = None
    monkeypatch.setattr(rehearsal, "parts", lambda *_: [fails, works])
    for name in ("device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: nullcontext())
    with pytest.raises(RuntimeError, match="no compiler is here"):
        rehearsal.rehearse(Transformer(SIZES), nothing, nothing)
    assert ran == [False]


def test_a_stream_launches_no_kernel_that_was_not_rehearsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By name, compile-time constants and what is absent: Triton compiles each of these anew."""
    from triton.runtime.interpreter import InterpretedFunction

    from modeling.gpu.kernels.resize import resize
    from modeling.gpu.kernels.transfer import transfer
    from modeling.gpu.rehearsal import parts
    from modeling.gpu.transformer import FusedTransformer
    from modeling.gpu.vae import fuse

    launched: set[tuple[object, ...]] = set()

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:  # and not run: that takes long
        absent = tuple(arg is None for arg in args)
        names = sorted((k, v) for k, v in kwargs.items() if k.isupper() or k == "num_warps")
        launched.add((self.fn.__name__, *names, *absent))

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    network, vae = Transformer(SIZES), build_vae(VaeConfig("wan", base_dim=4))
    assert isinstance(vae, WanVae)
    fuse(vae)
    fused = FusedTransformer(network)
    for part in parts(network, fused, vae):
        part()
    rehearsed = set(launched)
    assert {"_norm_silu", "_norm_rotate", "_add_norm", "_turn"} <= {name for name, *_ in rehearsed}

    launched.clear()
    _, state = vae.encode(torch.rand(1, 9, 3, 16, 24))
    vae.encode(torch.rand(1, 8, 3, 16, 24), state)
    _, state = vae.decode(torch.randn(1, 3, 16, 2, 3))
    vae.decode(torch.randn(1, 3, 16, 2, 3), state)
    cache = KVCache(
        SIZES, batch=1, latent_height=4, latent_width=6, chunk_latents=3, window_latents=9,
        sink_latents=3,
    )  # fmt: skip
    forward, text = FusedForward(fused, cache), network.prepare_text(torch.randn(1, 4, 8))
    latents = torch.randn(1, 3, 16, 4, 6)
    kept = Reuse("block", torch.zeros(0), torch.arange(7), fixed_size=True)
    for _ in range(5):  # chunks: the window fills, rolls, and its sinks are turned
        for reuse in (None, kept):
            forward(latents, latents, torch.ones(1), text, reuse)
        forward.refresh(latents, latents, text)
    large, small = (torch.zeros(2, *size, 3, dtype=torch.uint8) for size in ((18, 20), (16, 24)))
    transfer(large, resize(large, 16, 24, "bicubic"), small)
    assert launched <= rehearsed, sorted(map(str, launched - rehearsed))


def test_the_rope_of_a_chunk_is_read_where_it_lies(kernels: ModuleType) -> None:
    """A table longer than the tokens, as a cache's: token t takes row t."""
    table = rope_table(torch.arange(3), 2, 2, 8)
    qkv, weights = torch.randn(5, 24), torch.ones(2, 8)
    k, v = torch.zeros(2, 5, 8)
    q = kernels.heads.norm_rotate(qkv, weights, table, None, k, v, 1e-6)
    first = Rope(table.cos[:5], table.sin[:5])
    wanted = rotate(F.rms_norm(qkv[:, None, :8], (8,), eps=1e-6), first).flatten(1)
    torch.testing.assert_close(q, wanted, **CLOSE)
