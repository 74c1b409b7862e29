"""The transfer of `modeling.detail.transfer`, fused: the plain path's bits, see `resize`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.detail.transfer import EPSILON, ONE, REACH, WINDOW, ZERO
from modeling.gpu.kernels.resize import _SIZES, BLOCK, _grid, _sample, _side

# ruff: noqa: N803 - compile-time constants are upper case, as everywhere in Triton
# mypy: disallow_untyped_defs=False

_GAIN_SIZES = ["v_before", "v_taps", "v_bits", "u_before", "u_taps", "u_bits"]


def transfer(source: Tensor, seen: Tensor, edit: Tensor) -> Tensor:
    """As `transfer.transfer`."""
    height, width = source.shape[1:3]
    small = seen.shape[1:3]
    gain, out, device = gains(seen, edit), torch.empty_like(source), source.device
    sides = [
        *_side(small[0], height, "bicubic", device), *_side(small[1], width, "bicubic", device),
        *_side(small[0], height, "bilinear", device), *_side(small[1], width, "bilinear", device),
    ]  # fmt: skip
    _transfer[_grid(out)](
        source, seen, edit, gain, *sides, out, height, width, ONE=ONE, ZERO=ZERO, BLOCK=BLOCK
    )
    return out


def gains(seen: Tensor, edit: Tensor) -> Tensor:
    """As `transfer.gains`."""
    count, height, width = seen.shape[:3]
    gain = torch.empty_like(seen)
    slopes = seen.new_empty(count, height + 1, width + 1, 3)  # at corners of pixels
    _slopes[_grid(slopes)](
        seen, edit, slopes, height, width, EPSILON,
        REACH=REACH, WINDOW=WINDOW, ONE=ONE, ZERO=ZERO, BLOCK=BLOCK,
    )  # fmt: skip
    _means[_grid(seen)](slopes, gain, height, width, BLOCK=BLOCK)
    return gain


@triton.jit(do_not_specialize=["height", "width", "epsilon"])
def _slopes(
    seen, edit, out, height, width, epsilon,
    REACH: tl.constexpr, WINDOW: tl.constexpr, ONE: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = j < 3 * (width + 1)
    x, colour = j // 3, j % 3
    base = frame * height * width * 3
    sum_s = tl.zeros_like(j)
    sum_e = tl.zeros_like(j)
    sum_ss = tl.zeros_like(j)
    sum_se = tl.zeros_like(j)
    for v in range(-REACH, REACH):
        row = base + tl.minimum(tl.maximum(y + v, 0), height - 1) * width * 3
        for u in tl.static_range(-REACH, REACH):
            at = row + tl.minimum(tl.maximum(x + u, 0), width - 1) * 3 + colour
            s = tl.load(seen + at, inside, 0).to(tl.int32)
            e = tl.load(edit + at, inside, 0).to(tl.int32)
            sum_s += s
            sum_e += e
            sum_ss += s * s
            sum_se += s * e
    covariance = (WINDOW * sum_se - sum_s * sum_e + epsilon).to(tl.float32)
    variance = (WINDOW * sum_ss - sum_s * sum_s + epsilon).to(tl.float32)
    slope = tl.floor(tl.div_rn(ONE * covariance, variance) + 0.5)
    gain = tl.minimum(tl.maximum(slope, -ZERO), 255 - ZERO).to(tl.int32) + ZERO
    line = (frame * (height + 1) + y) * (width + 1) * 3
    tl.store(out + line + j, gain.to(tl.uint8), inside)


@triton.jit(do_not_specialize=["height", "width"])
def _means(slopes, out, height, width, BLOCK: tl.constexpr):
    """Rounded means of the four corners of a pixel."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = j < 3 * width
    total = tl.zeros_like(j) + 2
    for v in tl.static_range(2):
        row = slopes + (frame * (height + 1) + y + v) * (width + 1) * 3 + j
        for u in tl.static_range(2):
            total += tl.load(row + 3 * u, inside, 0).to(tl.int32)
    tl.store(out + (frame * height + y) * width * 3 + j, (total >> 2).to(tl.uint8), inside)


@triton.jit(do_not_specialize=_SIZES + _GAIN_SIZES)
def _transfer(
    source, seen, edit, gain, y_before, y_first, y_weights, y_taps, y_bits,
    x_before, x_first, x_weights, x_taps, x_bits, v_before, v_first, v_weights, v_taps, v_bits,
    u_before, u_first, u_weights, u_taps, u_bits, out, height, width,
    ONE: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = j < 3 * width
    small, at = frame * y_before * x_before * 3, (frame * height + y) * width * 3 + j
    large_seen = _sample(
        seen + small, j, y, inside, y_before, y_first, y_weights, y_taps, y_bits,
        x_before, x_first, x_weights, x_taps, x_bits,
    )  # fmt: skip
    large_edit = _sample(
        edit + small, j, y, inside, y_before, y_first, y_weights, y_taps, y_bits,
        x_before, x_first, x_weights, x_taps, x_bits,
    )  # fmt: skip
    share = _sample(
        gain + small, j, y, inside, v_before, v_first, v_weights, v_taps, v_bits,
        u_before, u_first, u_weights, u_taps, u_bits,
    )  # fmt: skip
    missing = tl.load(source + at, inside, 0).to(tl.int32) - large_seen
    value = large_edit + (((share - ZERO) * missing + ONE // 2) >> 6)
    tl.store(out + at, tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8), inside)
