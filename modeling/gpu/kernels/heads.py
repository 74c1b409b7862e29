"""What attention is given and gives: queries and keys normed and turned, parts of it merged.

T tokens, N heads, D head size; B batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from modeling.diffusion.rope import Rope

# ruff: noqa: N803 - compile-time constants are upper case, as everywhere in Triton
# mypy: disallow_untyped_defs=False


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


@triton.jit(do_not_specialize=["tokens"])
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


@triton.jit(do_not_specialize=["tokens"])
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
