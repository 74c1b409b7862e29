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
STRIP = 64  # rows
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
    seen, edit = (resize(small, height, width, "bicubic") for small in (seen, edit))
    out = torch.empty_like(source)
    for strip in _strips(height):
        missing = source[:, strip].short().sub_(seen[:, strip].short())
        # Fits 16 bits: at most 255 levels by 128.
        missing.mul_(gain[:, strip].short().sub_(ZERO)).add_(ONE // 2).bitwise_right_shift_(6)
        out[:, strip] = missing.add_(edit[:, strip].short()).clamp_(0, 255)
    return out


def _strips(height: int) -> list[slice]:
    """Rows that are worked on at once: what is made of them stays in a core's cache."""
    return [slice(top, min(top + STRIP, height)) for top in range(0, height, STRIP)]


def gains(seen: Tensor, edit: Tensor) -> Tensor:
    """The share of the source's detail that each pixel of the edit keeps, ZERO + ONE * share.

    The slope of e on s in a window, (cov(s, e) + FLAT) / (var(s) + FLAT), then the mean of 3 x 3
    slopes. Pictures go on beyond their border with its last pixel.
    """
    padded = torch.stack([beyond(seen, REACH), beyond(edit, REACH)])
    gain = torch.empty_like(seen)
    for strip in _strips(seen.shape[1]):
        gain[:, strip] = _slopes(*padded[:, :, strip.start : strip.stop + 2 * REACH].int())
    mean = sums(beyond(gain, 1).short(), 3).add_(4).float().div_(9)  # and cut off
    return mean.to(torch.uint8)


def _slopes(s: Tensor, e: Tensor) -> Tensor:
    """Of windows around all pixels but REACH at each border, int32 [n, H, W, 3] from 0 to 255."""
    sum_s, sum_e, sum_ss, sum_se = sums(torch.stack([s, e, s * s, s * e]), 2 * REACH + 1)
    covariance = sum_se.mul_(WINDOW).addcmul_(sum_s, sum_e, value=-1).add_(EPSILON)
    variance = sum_ss.mul_(WINDOW).addcmul_(sum_s, sum_s, value=-1).add_(EPSILON)
    slope = covariance.float().mul_(ONE).div_(variance.float()).add_(0.5).floor_()
    return slope.clamp_(-ZERO, 255 - ZERO).int().add_(ZERO)


def beyond(x: Tensor, reach: int) -> Tensor:
    """[n, H, W, 3] with `reach` more pixels on every side."""
    for axis in (1, 2):
        length = x.shape[axis]
        places = torch.arange(-reach, length + reach, device=x.device).clamp(0, length - 1)
        x = x.index_select(axis, places)
    return x


def sums(x: Tensor, count: int) -> Tensor:
    """Sums over squares of `count` = 2^k - 1 neighbours, [..., H, W, 3], by doubling."""
    for axis in (-3, -2):
        length = x.shape[axis] - count + 1
        total, run, size = x.narrow(axis, 0, length), x, 1
        while 2 * size <= count:
            whole = run.shape[axis] - size
            run = run.narrow(axis, 0, whole) + run.narrow(axis, size, whole)
            total = total + run.narrow(axis, 2 * size - 1, length)
            size *= 2
        x = total
    return x
