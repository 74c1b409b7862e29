"""A guide for the transfer without a second decoding: the source, as blurred as the VAE leaves it.

`transfer` wants the source as the editor sees it. Decoding the source again gives that exactly and
takes as long as decoding the edit; of a VAE that loses little, a Gaussian of a fraction of a pixel
comes near it. How wide, and whether that is near enough, is measured for each model (`liveedit
bench detail --model`) and stands in its directory as `stream.guide_blur`.

Whole numbers, so that all devices agree to the bit. Frames are uint8 [n, height, width, 3].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from modeling.detail.noise_gate import BITS as SHARE_BITS
from modeling.detail.noise_gate import WHOLE, WINDOW, around
from modeling.detail.transfer import ONE, ZERO, beyond, gains

BITS = 7  # of a weight: 255 levels times the sum of all then fit 16 bits
DEVIATIONS = 2.5  # at which the Gaussian ends
NARROWEST = 0.1  # pixels, below which a neighbour weighs nothing
# Mean levels of what a window's edit is beside a linear function of the guide: up to the first all
# of it is the VAE's error, above their sum all is new.
BELOW, RISE = 6, 8

Follow = Callable[[Tensor, Tensor], Tensor]  # seen, edit -> edit


def blurred(frames: Tensor, pixels: float) -> Tensor:
    """`frames` through a Gaussian of that many pixels, borders repeated; themselves for 0."""
    weights = gaussian(pixels)
    if len(weights) == 1:
        return frames
    # One by one, because a frame and what is made of it fit in a core's cache.
    pieces = frames.split(1 if frames.device.type == "cpu" else len(frames))
    return torch.cat([_blurred(piece, weights) for piece in pieces])


def gaussian(pixels: float) -> list[int]:
    """Weights of a pixel, its neighbours on either side and so on, their sum over a row 2^BITS."""
    reach = math.ceil(DEVIATIONS * pixels) if pixels > NARROWEST else 0
    heights = [math.exp(-((x / pixels) ** 2) / 2) if x else 1.0 for x in range(reach + 1)]
    unit = (1 << BITS) / (2 * sum(heights) - 1)
    outer = [round(unit * height) for height in heights[1:]]
    while outer and not outer[-1]:
        outer.pop()
    return [(1 << BITS) - 2 * sum(outer), *outer]


def _blurred(frames: Tensor, weights: list[int]) -> Tensor:
    frames = beyond(frames, len(weights) - 1)
    for axis in (1, 2):
        frames = _along(frames, axis, weights)
    return frames


def _along(frames: Tensor, axis: int, weights: list[int]) -> Tensor:
    reach = len(weights) - 1
    length = frames.shape[axis] - 2 * reach
    total = frames.narrow(axis, reach, length).short().mul_(weights[0])
    for offset, weight in enumerate(weights[1:], 1):
        for start in (reach - offset, reach + offset):
            total.add_(frames.narrow(axis, start, length), alpha=weight)
    return total.add_(1 << (BITS - 1)).bitwise_right_shift_(BITS).to(torch.uint8)


def following(seen: Tensor, edit: Tensor) -> Tensor:
    """`edit` as a linear function of `seen` around each pixel, and beside it what is new.

    What a VAE loses is not the same in edit and guide where the guide is no decoding, and would
    stay in the result as noise. A tone has no noise: where what is left over in a window is as
    small as a VAE's errors are, it is left out, as `noise_gate` does where nothing is edited.
    """
    piece = 1 if edit.device.type == "cpu" else len(edit)
    pairs = zip(seen.split(piece), edit.split(piece), strict=True)
    return torch.cat([_following(*pair) for pair in pairs])


def _following(seen: Tensor, edit: Tensor) -> Tensor:
    slope = gains(seen, edit).int().sub_(ZERO)
    sum_s, sum_e = (around(x.short()).int() for x in (seen, edit))
    line = slope.mul_(WINDOW * seen.int() - sum_s).add_(sum_e, alpha=ONE)
    line = line.add_(WINDOW * ONE // 2).div_(WINDOW * ONE, rounding_mode="floor").clamp_(0, 255)
    rest = edit.short().sub_(line.short())
    most = around(rest.abs()).amax(dim=-1, keepdim=True).int()
    share = ((most - BELOW * WINDOW) * WHOLE).div_(RISE * WINDOW, rounding_mode="floor")
    new = rest.int().mul_(share.clamp_(0, WHOLE)).add_(WHOLE // 2).bitwise_right_shift_(SHARE_BITS)
    return line.add_(new).to(torch.uint8)  # between the line and the edit
