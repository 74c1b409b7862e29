"""The GPU's arithmetic without a GPU: Triton's interpreter runs the kernels, at tiny sizes.

Each kernel against PyTorch's own operations; the networks that are made of them are in
`test_fused`. Graphs and the convolution in CUDA stay for GPUs (`test_accelerate`).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modeling.diffusion.rope import Rope, rope_table, rotate, time_shift

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run here", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton exists for Linux only")

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # of float32; sums are made in another order
pytestmark = pytest.mark.usefixtures("no_gradients")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    import modeling.gpu.kernels.heads
    import modeling.gpu.kernels.rows
    import modeling.gpu.kernels.vae

    return modeling.gpu.kernels


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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_norm_silu_rounds_once(kernels: ModuleType) -> None:
    """Whatever is between what it reads and what it writes is float32; infinity shows."""
    y, residual = torch.randn(2, 1, 1, 4, 6, 96).half()
    bias, gamma = torch.randn(2, 96).half()
    x, made, _ = kernels.vae.norm_silu(
        y, gamma, None, bias=bias, residual=residual, phases=False, layout="frames", keep=True
    )
    total = y.double() + bias.double() + residual.double()
    exact = F.silu(F.normalize(total, dim=-1) * 96**0.5 * gamma.double())
    for found, wanted in ((x, total), (made, exact)):
        # A number's own rounding, and a little of float32's.
        torch.testing.assert_close(found.double(), wanted, rtol=2**-11 * 1.001, atol=1e-6)
    y[0, 0, 0, 0, 0] = math.inf
    _, made, _ = kernels.vae.norm_silu(
        y, gamma, None, bias=bias, residual=None, phases=False, layout="frames", keep=False
    )
    assert not made[0, 0, 0, 0].isfinite().all()
    assert made[0, 0, 0, 1:].isfinite().all()


@DTYPES
def test_add_bias_residual(kernels: ModuleType, dtype: torch.dtype) -> None:
    """More than one block of 2048 numbers; rounded once, after both sums."""
    y, residual = torch.randn(2, 2, 250, 5).to(dtype)
    bias = torch.randn(5).to(dtype)
    wanted = (y.float() + bias.float() + residual.float()).to(dtype)
    assert torch.equal(kernels.vae.add_bias_residual(y, bias, residual), wanted)


def test_the_rope_of_a_chunk_is_read_where_it_lies(kernels: ModuleType) -> None:
    """A table longer than the tokens, as a cache's: token t takes row t."""
    table = rope_table(torch.arange(3), 2, 2, 8)
    qkv, weights = torch.randn(5, 24), torch.ones(2, 8)
    k, v = torch.zeros(2, 5, 8)
    q = kernels.heads.norm_rotate(qkv, weights, table, None, k, v, 1e-6)
    first = Rope(table.cos[:5], table.sin[:5])
    wanted = rotate(F.rms_norm(qkv[:, None, :8], (8,), eps=1e-6), first).flatten(1)
    torch.testing.assert_close(q, wanted, **CLOSE)
