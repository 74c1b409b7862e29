"""Pictures at another size, to the bit the same on every device.

A new row is a weighted sum of old ones, and so is a column. Weights are whole numbers over a power
of two, columns come first, and both sums are rounded to uint8. These are the numbers that PyTorch's
own resizing of uint8 pictures uses (`aten/src/ATen/native/cpu/UpSampleKernel.cpp`, after Pillow's),
which is therefore what a CPU runs.

Frames are uint8 [n, height, width, 3].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kernel = Literal["bicubic", "bilinear"]
Resize = Callable[[Tensor, int, int, Kernel], Tensor]  # frames, height, width

_BICUBIC = -0.5  # Keys' parameter, as in Pillow
_LARGEST = 1 << 15  # weights are stored in 16 bits


def resize(frames: Tensor, height: int, width: int, kernel: Kernel = "bicubic") -> Tensor:
    """`frames` at another size, smoothed where they shrink; themselves if nothing changes."""
    if frames.shape[1:3] == (height, width):
        return frames
    if frames.device.type != "cpu":
        return resize_by_taps(frames, height, width, kernel)
    pictures = frames.permute(0, 3, 1, 2)
    size = (height, width)
    return F.interpolate(pictures, size=size, mode=kernel, antialias=True).permute(0, 2, 3, 1)


def resize_by_taps(frames: Tensor, height: int, width: int, kernel: Kernel = "bicubic") -> Tensor:
    """`resize`, said in its weights: on any device."""
    for axis, length in ((2, width), (1, height)):
        if frames.shape[axis] != length:
            frames = _weighted(frames, axis, length, kernel)
    return frames


def _weighted(frames: Tensor, axis: int, length: int, kernel: Kernel) -> Tensor:
    first, weights, bits = taps(frames.shape[axis], length, kernel)
    total: Tensor | None = None
    for tap in range(weights.shape[1]):
        at = (first + tap).clamp(max=frames.shape[axis] - 1).to(frames.device)
        weight = weights[:, tap].to(frames.device)
        shape = [1, 1, 1, 1]
        shape[axis] = length
        part = frames.index_select(axis, at).int() * weight.view(shape)
        total = part if total is None else total + part
    assert total is not None
    return ((total + (1 << (bits - 1))) >> bits).clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def taps(before: int, after: int, kernel: Kernel) -> tuple[Tensor, Tensor, int]:
    """How a side of `before` pixels becomes one of `after`.

    Returns the first old pixel of every new one, int32 [after], the weights of that one and those
    that follow it, int32 [after, taps], and the bits b of their unit 2^b.
    """
    scale = before / after
    reach = (2.0 if kernel == "bicubic" else 1.0) * max(scale, 1.0)
    squeeze = 1 / max(scale, 1.0)
    rows, first = [], []
    for pixel in range(after):
        centre = scale * (pixel + 0.5)
        start, stop = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), before)
        row = [_weight((old - centre + 0.5) * squeeze, kernel) for old in range(start, stop)]
        rows.append([weight / sum(row) for weight in row])
        first.append(start)
    largest = max(max(row) for row in rows)
    bits = 0
    while int(0.5 + largest * (1 << (bits + 1))) < _LARGEST:
        bits += 1
    weights = torch.zeros(after, max(map(len, rows)), dtype=torch.int32)
    for pixel, row in enumerate(rows):
        for tap, weight in enumerate(row):
            weights[pixel, tap] = int(math.copysign(0.5, weight) + weight * (1 << bits))
    return torch.tensor(first, dtype=torch.int32), weights, bits


def _weight(x: float, kernel: Kernel) -> float:
    """The kernel's value at distance x (of pixels, or of new pixels where they are larger)."""
    x, a = abs(x), _BICUBIC
    if kernel == "bilinear":
        return 1 - x  # no tap lies further away
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0
