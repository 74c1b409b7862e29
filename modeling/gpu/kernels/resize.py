"""The resizing of `modeling.detail.resample`, fused.

It is whole numbers, so this gives the plain path's bits. A program makes a stretch of one row,
whose elements are pixels' colours side by side; frames are uint8 [n, H, W, 3], contiguous. How many
taps a weight table has is no constant of a kernel: all sizes share one compiled form.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.detail.resample import Kernel, taps

# ruff: noqa: N803 - compile-time constants are upper case, as everywhere in Triton
# mypy: disallow_untyped_defs=False

BLOCK = 512


class Side(NamedTuple):
    """`taps` of one side on the device."""

    before: int
    first: Tensor
    weights: Tensor
    taps: int
    bits: int


@lru_cache(maxsize=256)
def _side(before: int, after: int, kernel: Kernel, device: torch.device) -> Side:
    first, weights, bits = taps(before, after, kernel)
    return Side(before, first.to(device), weights.to(device), weights.shape[1], bits)


def resize(frames: Tensor, height: int, width: int, kernel: Kernel = "bicubic") -> Tensor:
    """As `resample.resize`."""
    count, *before = frames.shape[:3]
    if before == [height, width]:
        return frames
    out = frames.new_empty(count, height, width, 3)
    sides = [
        *_side(before[0], height, kernel, frames.device),
        *_side(before[1], width, kernel, frames.device),
    ]
    _resize[_grid(out)](frames.contiguous(), *sides, out, height, width, BLOCK=BLOCK)
    return out


def _grid(frames: Tensor) -> tuple[int, int, int]:
    count, height, width = frames.shape[:3]
    return triton.cdiv(3 * width, BLOCK), height, count


_SIZES = ["height", "width", "y_before", "y_taps", "y_bits", "x_before", "x_taps", "x_bits"]


@triton.jit(do_not_specialize=_SIZES)
def _resize(
    frames, y_before, y_first, y_weights, y_taps, y_bits,
    x_before, x_first, x_weights, x_taps, x_bits, out, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = j < 3 * width
    value = _sample(
        frames + frame * y_before * x_before * 3, j, y, inside,
        y_before, y_first, y_weights, y_taps, y_bits, x_before, x_first, x_weights, x_taps, x_bits,
    )  # fmt: skip
    tl.store(out + (frame * height + y) * width * 3 + j, value.to(tl.uint8), inside)


@triton.jit
def _sample(
    picture, j, y, inside, y_before, y_first, y_weights, y_taps, y_bits,
    x_before, x_first, x_weights, x_taps, x_bits,
):  # fmt: skip
    """Elements j of row y of a picture at another size, int32 from 0 to 255: columns first."""
    x, colour = j // 3, j % 3
    top = tl.load(y_first + y)
    left = tl.load(x_first + x, inside, 0)
    total = tl.zeros_like(j)
    for v in range(y_taps):
        row = picture + tl.minimum(top + v, y_before - 1) * x_before * 3 + colour
        line = tl.zeros_like(j)
        for u in range(x_taps):
            at = row + tl.minimum(left + u, x_before - 1) * 3
            weight = tl.load(x_weights + x * x_taps + u, inside, 0)
            line += tl.load(at, inside, 0).to(tl.int32) * weight
        total += _rounded(line, x_bits) * tl.load(y_weights + y * y_taps + v)
    return _rounded(total, y_bits)


@triton.jit
def _rounded(total, bits):
    return tl.minimum(tl.maximum((total + (1 << (bits - 1))) >> bits, 0), 255)
