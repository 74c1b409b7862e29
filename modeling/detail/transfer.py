"""The source's detail on an edit that was made at a smaller size.

The edit is a local linear function of the source as the editor sees it, colour by colour: its slope
in a window of both small pictures says how much of the source's detail the edit keeps (all of it
where nothing changed, half where contrast was halved, none of it under something new). That share
of what the small source lacks of the large one is added to the enlarged edit,

    out = up(edit) + up(gain) * (source - up(seen)).

"As the editor sees it" is the source after the VAE's own round trip: what the VAE loses is then
missing on both sides, and where nothing was changed the result is the source to the bit.
The slope is that of the guided filter (He et al. 2010), its use on another size that of joint
upsampling (Kopf et al. 2007). Everything is whole numbers, so that all devices agree to the bit.

Frames are uint8 [n, height, width, 3]; s is `seen`, e is `edit`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modeling.detail.resample import Resize, resize, resize_by_taps

REACH = 3  # pixels of the small picture around each: a window of 7 x 7
WINDOW = (2 * REACH + 1) ** 2
# Added to the window's variance and covariance, in squared levels: a window as flat as that keeps
# its detail, since in it there is nothing to tell a slope from.
FLAT = 2
EPSILON = FLAT * WINDOW * WINDOW  # in the units of `gains`
ONE = 64  # a gain of 1 in the numbers of `gains`
ZERO = 128  # a gain of 0; so gains reach from -2 to almost 2

Transfer = Callable[[Tensor, Tensor, Tensor], Tensor]  # source, seen, edit -> frames


def transfer(source: Tensor, seen: Tensor, edit: Tensor) -> Tensor:
    """The edit at the source's size; `seen` and `edit` have one size, any size."""
    if source.device.type != "cpu":
        return transfer_by_taps(source, seen, edit)
    # One by one, because a frame and what is made of it fit in a core's cache.
    frames = zip(source.split(1), seen.split(1), edit.split(1), strict=True)
    return torch.cat([_transfer(*one, resize) for one in frames])


def transfer_by_taps(source: Tensor, seen: Tensor, edit: Tensor) -> Tensor:
    """`transfer`, said plainly: on any device."""
    return _transfer(source, seen, edit, resize_by_taps)


def _transfer(source: Tensor, seen: Tensor, edit: Tensor, resize: Resize) -> Tensor:
    height, width = source.shape[1:3]
    gain = resize(gains(seen, edit), height, width, "bilinear")
    missing = source.short().sub_(resize(seen, height, width, "bicubic"))
    # Fits 16 bits: at most 255 levels by 128.
    missing.mul_(gain.short().sub_(ZERO)).add_(ONE // 2).bitwise_right_shift_(6)
    missing.add_(resize(edit, height, width, "bicubic"))
    return missing.clamp_(0, 255).to(torch.uint8)


def gains(seen: Tensor, edit: Tensor) -> Tensor:
    """The share of the source's detail that each pixel of the edit keeps, ZERO + ONE * share.

    The slope of e on s in a window, (cov(s, e) + FLAT) / (var(s) + FLAT), then the mean of 3 x 3
    slopes. Pictures go on beyond their border with its last pixel.
    """
    s, e = seen.int(), edit.int()
    sum_s, sum_e = _window(s, REACH), _window(e, REACH)
    covariance = WINDOW * _window(s * e, REACH) - sum_s * sum_e
    variance = WINDOW * _window(s * s, REACH) - sum_s * sum_s
    slope = ONE * (covariance + EPSILON).float() / (variance + EPSILON).float()
    gain = slope.round_().clamp_(-ZERO, 255 - ZERO).int().add_(ZERO)
    return _window(gain, 1).add_(4).div_(9, rounding_mode="floor").to(torch.uint8)


def _window(x: Tensor, reach: int) -> Tensor:
    """Sums of (2 reach + 1)^2 neighbours, int32 [n, H, W, 3]."""
    for axis in (1, 2):
        length = x.shape[axis]
        places = torch.arange(-reach, length + reach, device=x.device).clamp(0, length - 1)
        x = x.index_select(axis, places)
        x = _sums(x, axis, 2 * reach + 1)
    return x


def _sums(x: Tensor, axis: int, count: int) -> Tensor:
    """Sums of `count` neighbours along an axis, by doubling."""
    length = x.shape[axis] - count + 1
    total, done, run, size = None, 0, x, 1
    while count:
        if count & 1:
            part = run.narrow(axis, done, length)
            total = part if total is None else total + part
            done += size
        count >>= 1
        if count:
            run = run.narrow(axis, 0, run.shape[axis] - size) + run.narrow(
                axis, size, run.shape[axis] - size
            )
            size *= 2
    assert total is not None
    return total
