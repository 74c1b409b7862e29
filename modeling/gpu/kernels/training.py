"""Triton kernels for what lies between the matrix products in training, with their gradients.

They compute in float32 and round where the plain path rounds. A gradient of something that many
tokens share (a norm's weight, a frame's modulation) is summed up in parts, a program each, and the
parts by PyTorch: no atomics, so the same bits in every run.

R rows (tokens of all clips), P rows of one frame, F frames of all clips, N heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.diffusion.rope import Rope

# ruff: noqa: N803 - compile-time constants are upper case, as everywhere in Triton
# mypy: disallow_untyped_defs=False

_ROWS = 32  # of one program, where parts of sums are made


def add_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    modulated: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The residual sum s = x + gate * y, [R, dim], and its layer norm, scaled and shifted.

    `modulated` scales by 1 + scale, otherwise by scale. y None leaves x as it is, gate None adds
    all of y. gate, scale and shift are [F, dim] or [1, dim], with F a divisor of R.
    """
    total, normed = _AddNorm.apply(x, y, gate, scale, shift, modulated, eps)
    return total, normed


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        modulated: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        rows, dim = x.shape
        scale, shift = scale.contiguous(), shift.contiguous()
        gate = None if gate is None else gate.contiguous()
        total = torch.empty_like(x) if y is not None else x
        normed = torch.empty_like(x)
        frames = max(len(scale), 1 if gate is None else len(gate))
        _add_norm[(rows,)](
            x, y, gate, scale, shift, total, normed, rows // frames, _step(gate), _step(scale),
            dim, eps, HAS_Y=y is not None, HAS_GATE=gate is not None, MODULATED=modulated,
            BLOCK=triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(total, y if gate is not None else None, gate, scale)
        ctx.modulated, ctx.eps, ctx.adds, ctx.frames = modulated, eps, y is not None, frames
        return total if y is not None else x.view_as(x), normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_total, d_normed = (grad.contiguous() for grad in grads)
        total, y, gate, scale = ctx.saved_tensors
        rows, dim = total.shape
        frame_rows = rows // ctx.frames
        parts = triton.cdiv(frame_rows, _ROWS)
        d_x = torch.empty_like(total)
        d_y = torch.empty_like(total) if gate is not None else None
        sums = total.new_empty(3, ctx.frames, parts, dim, dtype=torch.float32)
        _add_norm_backward[(parts, ctx.frames)](
            total, y, gate, scale, d_total, d_normed, d_x, d_y, *sums, frame_rows, _step(gate),
            _step(scale), dim, ctx.eps, HAS_GATE=gate is not None, MODULATED=ctx.modulated,
            ROWS=_ROWS, BLOCK=triton.next_power_of_2(dim), num_warps=8,
        )  # fmt: skip
        d_gate, d_scale, d_shift = sums.sum(dim=2)  # [F, dim]
        d_scale, d_shift = _like(d_scale, scale), _like(d_shift, scale)
        if gate is None:
            return d_x, d_x if ctx.adds else None, None, d_scale, d_shift, None, None
        return d_x, d_y, _like(d_gate, gate), d_scale, d_shift, None, None


def _step(shared: Tensor | None) -> int:
    """From one frame's row of a modulation to the next one's; one row serves all frames."""
    return 0 if shared is None or len(shared) == 1 else shared.shape[1]


def _like(gradient: Tensor, shared: Tensor) -> Tensor:
    """Every frame's gradient [F, dim] as that of [F, dim], or of one row [1, dim] for all."""
    return (gradient if len(shared) == len(gradient) else gradient.sum(0, True)).to(shared.dtype)


@triton.jit
def _add_norm(
    x, y, gate, scale, shift, total, normed, frame_rows, gate_step, scale_step, dim, eps,
    HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, MODULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    inside = i < dim
    row = tl.program_id(0).to(tl.int64) * dim + i
    frame = (tl.program_id(0) // frame_rows).to(tl.int64)
    s = tl.load(x + row, inside, 0.0).to(tl.float32)
    if HAS_Y:
        added = tl.load(y + row, inside, 0.0).to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + frame * gate_step + i, inside, 0.0).to(tl.float32)
        rounded = (s + added).to(total.dtype.element_ty)
        tl.store(total + row, rounded, inside)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, 0) / dim
    centred = tl.where(inside, s - mean, 0.0)
    n = centred * tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
    a = tl.load(scale + frame * scale_step + i, inside, 0.0).to(tl.float32)
    b = tl.load(shift + frame * scale_step + i, inside, 0.0).to(tl.float32)
    if MODULATED:
        a += 1.0
    tl.store(normed + row, (n * a + b).to(normed.dtype.element_ty), inside)


@triton.jit
def _add_norm_backward(
    total, y, gate, scale, d_total, d_normed, d_x, d_y, d_gate, d_scale, d_shift,
    frame_rows, gate_step, scale_step, dim, eps,
    HAS_GATE: tl.constexpr, MODULATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    inside = i < dim
    part, frame = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    a = tl.load(scale + frame * scale_step + i, inside, 0.0).to(tl.float32)
    if MODULATED:
        a += 1.0
    g = a
    if HAS_GATE:
        g = tl.load(gate + frame * gate_step + i, inside, 0.0).to(tl.float32)
    sum_gate = tl.zeros((BLOCK,), tl.float32)
    sum_scale = tl.zeros((BLOCK,), tl.float32)
    sum_shift = tl.zeros((BLOCK,), tl.float32)
    for r in range(ROWS):
        here = i < tl.where(part * ROWS + r < frame_rows, dim, 0)
        row = (frame * frame_rows + part * ROWS + r) * dim + i
        s = tl.load(total + row, here, 0.0).to(tl.float32)
        d_h = tl.load(d_normed + row, here, 0.0).to(tl.float32)
        mean = tl.sum(s, 0) / dim
        centred = tl.where(inside, s - mean, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
        n = centred * inverse
        d_n = d_h * a
        d_s = d_n - tl.sum(d_n, 0) / dim - n * (tl.sum(d_n * n, 0) / dim)
        d_s = d_s * inverse + tl.load(d_total + row, here, 0.0).to(tl.float32)
        tl.store(d_x + row, d_s.to(d_x.dtype.element_ty), here)
        if HAS_GATE:
            tl.store(d_y + row, (d_s * g).to(d_y.dtype.element_ty), here)
            sum_gate += d_s * tl.load(y + row, here, 0.0).to(tl.float32)
        sum_scale += d_h * n
        sum_shift += d_h
    to = (frame * tl.num_programs(0) + part) * dim + i
    if HAS_GATE:
        tl.store(d_gate + to, sum_gate, inside)
    tl.store(d_scale + to, sum_scale, inside)
    tl.store(d_shift + to, sum_shift, inside)


def norm_rotate(x: Tensor, weight: Tensor, rope: Rope | None, eps: float) -> Tensor:
    """RMS norm of x [R, dim] over all heads, and each head's pairs turned by `rope`.

    Row r takes row r % T of `rope` [T, D/2]; None turns nothing.
    """
    normed: Tensor = _NormRotate.apply(x, weight, *(rope or (None, None)), eps)
    return normed


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
    ) -> Tensor:
        x = x.contiguous()
        rows, dim = x.shape
        out = torch.empty_like(x)
        tokens, half_head = (1, 1) if cos is None else cos.shape
        _norm_rotate[(rows,)](
            x, weight, cos, sin, out, tokens, half_head, dim, eps,
            TURNS=cos is not None, HALF=triton.next_power_of_2(dim // 2), num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        rows, dim = x.shape
        parts = triton.cdiv(rows, _ROWS)
        d_x = torch.empty_like(x)
        sums = x.new_empty(parts, dim, dtype=torch.float32)
        tokens, half_head = (1, 1) if cos is None else cos.shape
        _norm_rotate_backward[(parts,)](
            x, weight, cos, sin, d_out.contiguous(), d_x, sums, rows, tokens, half_head, dim,
            ctx.eps, TURNS=cos is not None, ROWS=_ROWS, HALF=triton.next_power_of_2(dim // 2),
            num_warps=8,
        )  # fmt: skip
        return d_x, sums.sum(dim=0).to(weight.dtype), None, None, None


@triton.jit
def _norm_rotate(
    x, weight, cos, sin, out, tokens, half_head, dim, eps,
    TURNS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    inside = (2 * pair < dim)[:, None]
    i = 2 * pair[:, None] + tl.arange(0, 2)[None, :]  # [pairs, 2]
    wide = tl.load(x + row * dim + i, inside, 0.0).to(tl.float32)
    square = tl.sum(tl.sum(wide * wide, 1), 0) / dim
    w = tl.load(weight + i, inside, 0.0).to(tl.float32)
    kind = out.dtype.element_ty
    n = (wide * tl.rsqrt(square + eps) * w).to(kind)
    if TURNS:
        place = (row % tokens) * half_head + pair % half_head
        c = tl.load(cos + place, 2 * pair < dim, 0.0)
        s = tl.load(sin + place, 2 * pair < dim, 0.0)
        even, odd = tl.split(n.to(tl.float32))
        n = tl.join(even * c - odd * s, even * s + odd * c).to(kind)
    tl.store(out + row * dim + i, n, inside)


@triton.jit
def _norm_rotate_backward(
    x, weight, cos, sin, d_out, d_x, sums, rows, tokens, half_head, dim, eps,
    TURNS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)
    inside = (2 * pair < dim)[:, None]
    i = 2 * pair[:, None] + tl.arange(0, 2)[None, :]  # [pairs, 2]
    w = tl.load(weight + i, inside, 0.0).to(tl.float32)
    total = tl.zeros((HALF, 2), tl.float32)
    for r in range(ROWS):
        row = part * ROWS + r
        here = (2 * pair < tl.where(row < rows, dim, 0))[:, None]
        at = row * dim + i
        wide = tl.load(x + at, here, 0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / dim + eps)
        n = wide * inverse
        d = tl.load(d_out + at, here, 0.0).to(tl.float32)
        if TURNS:
            place = (row % tokens) * half_head + pair % half_head
            c = tl.load(cos + place, 2 * pair < dim, 0.0)
            s = tl.load(sin + place, 2 * pair < dim, 0.0)
            even, odd = tl.split(d)
            d = tl.join(even * c + odd * s, odd * c - even * s)
        total += d * n
        d_n = d * w
        shared = tl.sum(tl.sum(d_n * n, 1), 0) / dim
        tl.store(d_x + at, ((d_n - n * shared) * inverse).to(d_x.dtype.element_ty), here)
    tl.store(sums + part * dim + i, total, inside)
