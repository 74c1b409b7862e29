"""Triton kernels for what lies between the matrix products, each one pass over memory.

They compute in float32 and round where the plain path rounds, so that both paths stay close. All
tensors are contiguous unless said otherwise.

T tokens, N heads, D head size; B batch, F frames, H x W size, C channels, channels innermost.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.diffusion.rope import Rope

# ruff: noqa: N803 - compile-time constants are upper case, as everywhere in Triton
# mypy: disallow_untyped_defs=False

FP8 = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)  # the largest number of that type


class Fp8(NamedTuple):
    """Rows in 8 bits, each with a scale of its own: values [T, K] * scales [T, 1]."""

    values: Tensor
    scales: Tensor

    def rows(self, chosen: Tensor) -> Fp8:
        return Fp8(self.values[chosen], self.scales[chosen])


def _room_for_fp8(tokens: int, dim: int, device: torch.device) -> Fp8:
    values = torch.empty(tokens, dim, dtype=FP8, device=device)
    return Fp8(values, torch.empty(tokens, 1, device=device))


def add_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    modulated: bool,
    eps: float,
    fp8: bool = False,
) -> tuple[Tensor, Tensor | Fp8]:
    """The residual sum s = x + gate * y, [T, dim], and its layer norm, scaled and shifted.

    `modulated` scales by 1 + scale, otherwise by scale. y None leaves x as it is, gate None adds
    all of y. gate, scale and shift are [dim].
    """
    tokens, dim = x.shape
    total = x if y is None else torch.empty_like(x)
    rows = _room_for_fp8(tokens, dim, x.device) if fp8 else Fp8(torch.empty_like(x), x)
    _add_norm[(tokens,)](
        x, y, gate, scale, shift, total, *rows, dim, eps,
        HAS_Y=y is not None, HAS_GATE=gate is not None, MODULATED=modulated, QUANTISED=fp8,
        BLOCK=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return total, rows if fp8 else rows.values


@triton.jit
def _add_norm(
    x, y, gate, scale, shift, total, normed, scales, dim, eps,
    HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, MODULATED: tl.constexpr, QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    inside = i < dim
    row = tl.program_id(0).to(tl.int64) * dim + i
    s = tl.load(x + row, inside, 0.0).to(tl.float32)
    if HAS_Y:
        added = tl.load(y + row, inside, 0.0).to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + i, inside, 0.0).to(tl.float32)
        rounded = (s + added).to(total.dtype.element_ty)
        tl.store(total + row, rounded, inside)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, 0) / dim
    centred = tl.where(inside, s - mean, 0.0)
    n = centred * tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
    a = tl.load(scale + i, inside, 0.0).to(tl.float32)
    b = tl.load(shift + i, inside, 0.0).to(tl.float32)
    if MODULATED:
        a += 1.0
    result = n * a + b
    if QUANTISED:
        result = _quantised(result, scales + tl.program_id(0))
    tl.store(normed + row, result.to(normed.dtype.element_ty), inside)


@triton.jit
def _quantised(row, scale):
    """A row over its scale, which is stored: its largest number becomes the type's largest."""
    s = tl.maximum(tl.max(tl.abs(row), 0), 1e-12) / FP8_MAX
    tl.store(scale, s)
    return row / s


def gelu_fp8(x: Tensor) -> Fp8:
    """GELU (tanh) of x [T, K], in 8 bits."""
    rows = _room_for_fp8(x.shape[0], x.shape[1], x.device)
    _gelu_fp8[(len(x),)](
        x, *rows, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=16
    )
    return rows


@triton.jit
def _gelu_fp8(x, values, scales, dim, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * dim + i
    v = tl.load(x + row, i < dim, 0.0).to(tl.float32)
    # tanh(u) = 1 - 2 / (1 + exp(2 u)); 2 * sqrt(2 / pi) = 1.5957691216057308
    u = 1.5957691216057308 * (v + 0.044715 * v * v * v)
    gelu = v * (1.0 - 1.0 / (1.0 + tl.exp(u)))
    quantised = _quantised(gelu, scales + tl.program_id(0))
    tl.store(values + row, quantised.to(values.dtype.element_ty), i < dim)


def norm_rotate(
    qkv: Tensor,
    weights: Tensor,
    rope: Rope,
    tokens: Tensor | None,
    k: Tensor,
    v: Tensor,
    eps: float,
) -> Tensor:
    """Normalised and rotated queries [T, dim]; keys and values go to k and v [T, dim].

    qkv [T, 3 * dim], weights [2, dim] of the norms of q and k; token t takes row t of `rope`, or
    row `tokens[t]`.
    """
    count, dim = qkv.shape[0], qkv.shape[1] // 3
    q = qkv.new_empty(count, dim)
    _norm_rotate[(count,)](
        qkv, weights, rope.cos, rope.sin, tokens, q, k, v, dim, rope.cos.shape[1], eps,
        LISTED=tokens is not None, HALF=triton.next_power_of_2(dim // 2), num_warps=4,
    )  # fmt: skip
    return q


@triton.jit
def _norm_rotate(
    qkv, weights, cos, sin, tokens, q, k, v, dim, half_head, eps,
    LISTED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    inside = (2 * pair < dim)[:, None]
    i = 2 * pair[:, None] + tl.arange(0, 2)[None, :]  # [pairs, 2]
    row = tl.load(tokens + token) if LISTED else token
    place = row * half_head + pair % half_head
    c = tl.load(cos + place, 2 * pair < dim, 0.0)
    s = tl.load(sin + place, 2 * pair < dim, 0.0)
    source = qkv + token * 3 * dim + i
    x_q = tl.load(source, inside, 0.0)
    x_k = tl.load(source + dim, inside, 0.0)
    x_v = tl.load(source + 2 * dim, inside, 0.0)
    to = token * dim + i
    tl.store(v + to, x_v, inside)
    tl.store(q + to, _turned(x_q, weights + i, inside, c, s, dim, eps), inside)
    tl.store(k + to, _turned(x_k, weights + dim + i, inside, c, s, dim, eps), inside)


@triton.jit
def _turned(x, weights, inside, c, s, dim, eps):
    """x [pairs, 2] normalised over all pairs, and each pair turned."""
    wide = x.to(tl.float32)
    square = tl.sum(tl.sum(wide * wide, 1), 0) / dim
    weight = tl.load(weights, inside, 0.0).to(tl.float32)
    n = (wide * tl.rsqrt(square + eps) * weight).to(x.dtype).to(tl.float32)
    even, odd = tl.split(n)
    return tl.join(even * c - odd * s, even * s + odd * c).to(x.dtype)


def turn(x: Tensor, rope: Rope, out: Tensor) -> None:
    """`rotate` by one token's rope, x [layers, B, T, N, D] into out [layers, B, T' >= T, N, D].

    x may be the first T tokens of something longer; so may out.
    """
    layers, batch, tokens, heads, size = x.shape
    _turn[(layers * batch * tokens,)](
        x, rope.cos, rope.sin, out, tokens, x.stride(1), out.stride(1), heads * size, size // 2,
        HALF=triton.next_power_of_2(heads * size // 2), num_warps=4,
    )  # fmt: skip


@triton.jit
def _turn(
    x, cos, sin, out, tokens, x_stride, out_stride, dim, half_head, HALF: tl.constexpr
):  # fmt: skip
    stream, token = tl.program_id(0).to(tl.int64) // tokens, tl.program_id(0) % tokens
    pair = tl.arange(0, HALF)
    inside = (2 * pair < dim)[:, None]
    i = token * dim + 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    even, odd = tl.split(tl.load(x + stream * x_stride + i, inside, 0.0).to(tl.float32))
    c = tl.load(cos + pair % half_head, 2 * pair < dim, 0.0)
    s = tl.load(sin + pair % half_head, 2 * pair < dim, 0.0)
    turned = tl.join(even * c - odd * s, even * s + odd * c)
    tl.store(out + stream * out_stride + i, turned.to(out.dtype.element_ty), inside)


def merge_attention(parts: Tensor, lse: Tensor) -> Tensor:
    """Attention over all keys from attention over each of S groups of them.

    parts [S, T, N, D], lse [S, N, T] (the logarithm of each softmax's denominator) -> [T, N, D].
    """
    splits, tokens, heads, size = parts.shape
    out = parts.new_empty(tokens, heads, size)
    _merge[(tokens,)](
        parts, lse, out, tokens, heads, size,
        SPLITS=splits, HEADS=triton.next_power_of_2(heads), SIZE=triton.next_power_of_2(size),
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _merge(
    parts, lse, out, tokens, heads, size,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.arange(0, HEADS), tl.arange(0, SIZE)
    inside = (head < heads)[:, None] & (d < size)[None, :]
    i = head[:, None] * size + d[None, :]
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    for s in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(lse + (s * heads + head) * tokens + token, head < heads, 0.0))
    total = tl.zeros((HEADS, SIZE), tl.float32)
    mass = tl.zeros((HEADS,), tl.float32)
    for s in tl.static_range(SPLITS):
        share = tl.exp(tl.load(lse + (s * heads + head) * tokens + token, head < heads, 0.0) - top)
        part = tl.load(parts + (s * tokens + token) * heads * size + i, inside, 0.0)
        total += share[:, None] * part.to(tl.float32)
        mass += share
    merged = (total / mass[:, None]).to(out.dtype.element_ty)
    tl.store(out + token * heads * size + i, merged, inside)


def norm_silu(
    y: Tensor,
    gamma: Tensor,
    past: Tensor | None,
    *,
    bias: Tensor | None,
    residual: Tensor | None,
    phases: bool,
    layout: Literal["frames", "padded", "stacked"],
    keep: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """A causal convolution's input: SiLU of the RMS norm of x = y + bias + residual.

    Returns x [B, F, H, W, C] (None unless asked to `keep` it), the input, and the last two of its
    frames and the `past` ones before them (None is zeros), which are the next call's `past`
    [B, 2, H, W, C]. The `layout` of the input is "frames" [B, F, H, W, C], "padded"
    [B, F + 2, H, W, C] with `past` in front, or "stacked" [B, F, H, W, 3 * C], the three frames
    that an output sees side by side. bias and gamma are [C].
    y is [B, F, H, W, C], or with `phases` what a sub-pixel convolution gives,
    [B, F, H/2 + 1, W/2 + 1, 4 * C] (see `vae.phase_weights`).
    """
    batch, frames, height, width, channels = y.shape
    if phases:
        height, width, channels = 2 * (height - 1), 2 * (width - 1), channels // 4
    x = y.new_empty(batch, frames, height, width, channels) if keep else None
    shape = {
        "frames": (frames, height, width, channels),
        "padded": (frames + 2, height, width, channels),
        "stacked": (frames, height, width, 3 * channels),
    }[layout]
    out = y.new_empty(batch, *shape)
    tail = y.new_empty(batch, 2, height, width, channels)
    block = triton.next_power_of_2(channels)
    rows = max(1, 4096 // block)
    # A past frame is only copied, into the padded input or because it stays one of the last two.
    first = min(2, frames) if layout == "frames" else 0
    _norm_silu[(triton.cdiv(height * width, rows), frames + 2 - first, batch)](
        y, bias, residual, gamma, past, x, out, tail, first, frames, height, width, channels,
        channels**0.5,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, HAS_PAST=past is not None,
        KEEP=keep, PHASES=phases, LAYOUT=layout, ROWS=rows, BLOCK=block,
        num_warps=8 if block <= 128 else 4,
    )  # fmt: skip
    return x, out, tail


@triton.jit
def _norm_silu(
    y, bias, residual, gamma, past, x, out, tail, first, frames, height, width, channels, length,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_PAST: tl.constexpr, KEEP: tl.constexpr,
    PHASES: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of a frame; offsets in one fit 32 bits
    frame, clip = tl.program_id(1) + first, tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    plane = height * width
    inside = (place < plane)[:, None] & (c < channels)
    i = place[:, None] * channels + c
    size = plane.to(tl.int64) * channels
    kind = out.dtype.element_ty
    if frame < 2:
        if HAS_PAST:
            value = tl.load(past + (clip * 2 + frame) * size + i, inside, 0.0)
        else:
            value = tl.zeros((ROWS, BLOCK), kind)
    else:
        at = clip * frames + frame - 2
        if PHASES:
            h, w = place // width, place % width
            across = width // 2 + 1
            up = ((h + 1) // 2 * across + (w + 1) // 2) * 4 + h % 2 * 2 + w % 2
            base = at * (height // 2 + 1) * across * 4 * channels
            wide = tl.load(y + base + up[:, None] * channels + c, inside, 0.0).to(tl.float32)
        else:
            wide = tl.load(y + at * size + i, inside, 0.0).to(tl.float32)
        if HAS_BIAS:
            wide += tl.load(bias + c, c < channels, 0.0).to(tl.float32)
            wide = wide.to(kind).to(tl.float32)
        if HAS_RESIDUAL:
            wide += tl.load(residual + at * size + i, inside, 0.0).to(tl.float32)
            wide = wide.to(kind).to(tl.float32)
        if KEEP:
            tl.store(x + at * size + i, wide.to(kind), inside)
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
        scale = tl.load(gamma + c, c < channels, 0.0).to(tl.float32)
        wide = (wide * inverse[:, None]).to(kind).to(tl.float32)
        wide = (wide * length).to(kind).to(tl.float32)
        wide = (wide * scale).to(kind).to(tl.float32)
        value = (wide / (1.0 + tl.exp(-wide))).to(kind)
    if LAYOUT == "stacked":
        j = place[:, None] * (3 * channels) + c
        for t in tl.static_range(3):
            if (frame >= t) & (frame - t < frames):
                seen_by = clip * frames + frame - t
                tl.store(out + seen_by * 3 * size + j + t * channels, value, inside)
    elif LAYOUT == "padded":
        tl.store(out + (clip * (frames + 2) + frame) * size + i, value, inside)
    elif frame >= 2:
        tl.store(out + (clip * frames + frame - 2) * size + i, value, inside)
    if frame >= frames:
        tl.store(tail + (clip * 2 + frame - frames) * size + i, value, inside)


def add_bias_residual(y: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """y + bias + residual; y and residual [..., C], bias [C]."""
    out = torch.empty_like(y)
    count, block = y.numel(), 2048
    _add_bias_residual[(triton.cdiv(count, block),)](
        y, bias, residual, out, count, y.shape[-1], BLOCK=block, num_warps=4
    )
    return out


@triton.jit
def _add_bias_residual(y, bias, residual, out, count, channels, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    kind = out.dtype.element_ty
    value = tl.load(y + i, inside, 0.0).to(tl.float32) + tl.load(bias + i % channels).to(tl.float32)
    value = value.to(kind).to(tl.float32) + tl.load(residual + i, inside, 0.0).to(tl.float32)
    tl.store(out + i, value.to(kind), inside)
