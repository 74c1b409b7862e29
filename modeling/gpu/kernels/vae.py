"""What lies between a VAE's convolutions: norm and SiLU, bias and residual.

B batch, F frames, H x W size, C channels, which are innermost.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

# ruff: noqa: N803 - compile-time constants are upper case, as everywhere in Triton
# mypy: disallow_untyped_defs=False


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
    # Whatever is absent is told by a flag and stands as another pointer, so that nothing but the
    # layer's shape makes another kernel: compiling them is most of a cold process's first chunk.
    _norm_silu[(triton.cdiv(height * width, rows), frames + 2 - first, batch)](
        y, *(y if part is None else part for part in (bias, residual)), gamma,
        *(y if part is None else part for part in (past, x)), out, tail,
        first, frames, height, width, int(bias is not None), int(residual is not None),
        int(past is not None), int(keep), channels, channels**0.5,
        PHASES=phases, LAYOUT=layout, ROWS=rows, BLOCK=block, num_warps=8 if block <= 128 else 4,
    )  # fmt: skip
    return x, out, tail


_RUN_TIME = ["first", "frames", "height", "width", "has_bias", "has_residual", "has_past", "keep"]


@triton.jit(do_not_specialize=_RUN_TIME)
def _norm_silu(
    y, bias, residual, gamma, past, x, out, tail, first, frames, height, width,
    has_bias, has_residual, has_past, keep, channels, length,
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
        if has_past:
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
        if has_bias:
            wide += tl.load(bias + c, c < channels, 0.0).to(tl.float32)
        if has_residual:
            wide += tl.load(residual + at * size + i, inside, 0.0).to(tl.float32)
        if keep:
            tl.store(x + at * size + i, wide.to(kind), inside)
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
        scale = tl.load(gamma + c, c < channels, 0.0).to(tl.float32)
        wide *= inverse[:, None] * length * scale
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
    value = tl.load(y + i, inside, 0.0).to(tl.float32) + tl.load(bias + i % channels).to(tl.float32)
    value += tl.load(residual + i, inside, 0.0).to(tl.float32)
    tl.store(out + i, value.to(out.dtype.element_ty), inside)
