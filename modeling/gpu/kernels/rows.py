"""Rows of tokens: residual sum, layer norm and GELU, in 8 bits where the next layer takes them.

T tokens, K channels of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
