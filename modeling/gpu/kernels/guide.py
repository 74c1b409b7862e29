"""`modeling.detail.guide.following`, fused: the plain path's bits, see `resize`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.detail.guide import BELOW, RISE
from modeling.detail.noise_gate import BITS, REACH, WHOLE, WINDOW
from modeling.detail.transfer import ONE, ZERO
from modeling.gpu.kernels.resize import BLOCK, _grid
from modeling.gpu.kernels.transfer import gains

# ruff: noqa: N803 - compile-time constants are upper case, as everywhere in Triton
# mypy: disallow_untyped_defs=False


def following(seen: Tensor, edit: Tensor) -> Tensor:
    """As `guide.following`."""
    height, width = seen.shape[1:3]
    line, rest, out = (torch.empty_like(seen) for _ in range(3))
    _lines[_grid(seen)](
        seen, edit, gains(seen, edit), line, rest, height, width,
        REACH=REACH, WINDOW=WINDOW, ONE=ONE, ZERO=ZERO, BLOCK=BLOCK,
    )  # fmt: skip
    _news[_grid(seen)](
        edit, line, rest, out, height, width, BELOW * WINDOW, RISE * WINDOW,
        REACH=REACH, WHOLE=WHOLE, BITS=BITS, BLOCK=BLOCK,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["height", "width"])
def _lines(
    seen, edit, gain, line, rest, height, width,
    REACH: tl.constexpr, WINDOW: tl.constexpr, ONE: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the edit is as a linear function, and by how much it differs."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = j < 3 * width
    x, colour = j // 3, j % 3
    base = frame * height * width * 3
    sum_s = tl.zeros_like(j)
    sum_e = tl.zeros_like(j)
    for v in range(-REACH, REACH + 1):
        row = base + tl.minimum(tl.maximum(y + v, 0), height - 1) * width * 3
        for u in tl.static_range(-REACH, REACH + 1):
            at = row + tl.minimum(tl.maximum(x + u, 0), width - 1) * 3 + colour
            sum_s += tl.load(seen + at, inside, 0).to(tl.int32)
            sum_e += tl.load(edit + at, inside, 0).to(tl.int32)
    at = base + y * width * 3 + j
    s = tl.load(seen + at, inside, 0).to(tl.int32)
    e = tl.load(edit + at, inside, 0).to(tl.int32)
    slope = tl.load(gain + at, inside, 0).to(tl.int32) - ZERO
    value = slope * (WINDOW * s - sum_s) + ONE * sum_e + WINDOW * ONE // 2
    # Below 0 a quotient is cut off the other way than on a CPU, and is 0 there in any case.
    value = tl.minimum(tl.maximum(value, 0) // (WINDOW * ONE), 255)
    tl.store(line + at, value.to(tl.uint8), inside)
    tl.store(rest + at, tl.abs(e - value).to(tl.uint8), inside)


@triton.jit(do_not_specialize=["height", "width", "below", "rise"])
def _news(
    edit, line, rest, out, height, width, below, rise,
    REACH: tl.constexpr, WHOLE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The line, and of the difference what is more than a VAE's errors."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = j < 3 * width
    x = j // 3
    base = frame * height * width * 3
    red = tl.zeros_like(j)
    green = tl.zeros_like(j)
    blue = tl.zeros_like(j)
    for v in range(-REACH, REACH + 1):
        row = rest + base + tl.minimum(tl.maximum(y + v, 0), height - 1) * width * 3
        for u in tl.static_range(-REACH, REACH + 1):
            pixel = row + tl.minimum(tl.maximum(x + u, 0), width - 1) * 3
            red += tl.load(pixel, inside, 0).to(tl.int32)
            green += tl.load(pixel + 1, inside, 0).to(tl.int32)
            blue += tl.load(pixel + 2, inside, 0).to(tl.int32)
    most = tl.maximum(red, tl.maximum(green, blue))
    share = tl.minimum(tl.maximum(most - below, 0) * WHOLE // rise, WHOLE)
    at = base + y * width * 3 + j
    value = tl.load(line + at, inside, 0).to(tl.int32)
    new = (tl.load(edit + at, inside, 0).to(tl.int32) - value) * share
    value += (new + WHOLE // 2) >> BITS
    tl.store(out + at, value.to(tl.uint8), inside)  # between the line and the edit
