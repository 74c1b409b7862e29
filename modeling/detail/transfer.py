"""The source's detail on an edit that was made at a smaller size.

The edit is a local linear function of the source as the editor sees it, colour by colour: its slope
in a window of both small pictures says how much of the source's detail the edit keeps (all of it
where nothing changed, half where contrast was halved, none of it under something new). That share
of what the small source lacks of the large one is added to the enlarged edit,

    out = up(edit) + up(gain) * (source - up(seen)).

"As the editor sees it" is the source after the VAE's own round trip, or what comes near that of an
exact VAE (`guide`): what the VAE loses is then missing on both sides, and where nothing was changed
the result is the source to the bit.
The slope is that of the guided filter (He et al. 2010), its use on another size that of joint
upsampling (Kopf et al. 2007). Everything is whole numbers, so that all devices agree to the bit.

Frames are uint8 [n, height, width, 3]; s is `seen`, e is `edit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from modeling.detail.resample import Resize, resize, resize_by_taps

SIDE = 8  # pixels of a window, around a corner of four pixels; a power of two, see `windows`
WINDOW = SIDE**2
REACH = SIDE // 2  # pixels around each that decide its gain
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
    out = torch.empty_like(source)
    # One by one, because a frame and what is made of it fit in a core's cache.
    for one in zip(source.split(1), seen.split(1), edit.split(1), out.split(1), strict=True):
        _transfer(*one, resize, _edited_rows(*one[1:3]))
    return out


def transfer_by_taps(source: Tensor, seen: Tensor, edit: Tensor) -> Tensor:
    """`transfer`, said plainly: on any device."""
    out = torch.empty_like(source)
    _transfer(source, seen, edit, out, resize_by_taps, slice(0, seen.shape[1]))
    return out


def _transfer(
    source: Tensor, seen: Tensor, edit: Tensor, out: Tensor, resize: Resize, rows: slice
) -> None:
    """Into `out`; where none of the small `rows` reaches, that is the source."""
    small, (height, width) = seen.shape[1], source.shape[1:3]
    if rows.start == rows.stop:
        out.copy_(source)
        return
    reached = _around(rows, REACH, small)
    among = _around(reached, REACH, small)
    gain = torch.full_like(seen, ZERO + ONE)
    inner = slice(reached.start - among.start, reached.stop - among.start)
    gain[:, reached] = gains(seen[:, among], edit[:, among])[:, inner]
    gain = resize(gain, height, width, "bilinear")
    seen, edit = (resize(small, height, width, "bicubic") for small in (seen, edit))
    large = _enlarged(reached, small, height)
    out[:, : large.start], out[:, large.stop :] = source[:, : large.start], source[:, large.stop :]
    for strip in _strips(large):
        missing = source[:, strip].short().sub_(seen[:, strip].short())
        # Fits 16 bits: at most 255 levels by 128.
        missing.mul_(gain[:, strip].short().sub_(ZERO)).add_(ONE // 2).bitwise_right_shift_(6)
        out[:, strip] = missing.add_(edit[:, strip].short()).clamp_(0, 255)


def _edited_rows(seen: Tensor, edit: Tensor) -> slice:
    """From the first to the last row in which one frame of them differs. Elsewhere slopes are 1 and
    the result is the source, as the gate leaves most of the picture around an edited thing."""
    rows = (seen ^ edit).flatten(2).amax(dim=(0, 2)).nonzero()
    return slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)


def _around(rows: slice, reach: int, count: int) -> slice:
    """`rows` of `count`, and `reach` more on either side."""
    return slice(max(rows.start - reach, 0), min(rows.stop + reach, count))


def _enlarged(rows: slice, small: int, large: int) -> slice:
    """The rows of a picture of `large` rows that resizing makes of these."""
    scale = large / small
    reach = 1 + 2 * max(scale, 1.0)  # of the kernels, in large pixels
    first, last = math.floor(rows.start * scale - reach), math.ceil(rows.stop * scale + reach)
    return slice(max(first, 0), min(last, large))


def _strips(rows: slice) -> list[slice]:
    """Rows that are worked on at once: what is made of them stays in a core's cache."""
    tops = range(rows.start, rows.stop, STRIP)
    return [slice(top, min(top + STRIP, rows.stop)) for top in tops]


def gains(seen: Tensor, edit: Tensor) -> Tensor:
    """The share of the source's detail that each pixel of the edit keeps, ZERO + ONE * share.

    The slope of e on s in a window, (cov(s, e) + FLAT) / (var(s) + FLAT), then the mean of the
    windows around a pixel's four corners. Pictures go on beyond their border with its last pixel.
    """
    gain = torch.empty_like(seen)
    seen, edit = beyond(seen, REACH), beyond(edit, REACH)
    for strip in _strips(slice(0, gain.shape[1])):
        around = slice(strip.start, strip.stop + SIDE)
        total = windows(_slopes(seen[:, around], edit[:, around]), 2)
        gain[:, strip] = total.add_(2).bitwise_right_shift_(2)
    return gain


def _slopes(s: Tensor, e: Tensor) -> Tensor:
    """Of all windows in [n, H, W, 3], whole numbers int16 [n, H - 7, W - 7, 3] from 0 to 255. Sums
    fit 16 bits, sums of squares 32."""
    pair = torch.stack([s.short(), e.short()])
    squares = pair.int()
    sum_ss, sum_se = windows(squares[:1] * squares, SIDE)
    sum_s, sum_e = windows(pair, SIDE).int()
    covariance = sum_se.mul_(WINDOW).addcmul_(sum_s, sum_e, value=-1).add_(EPSILON)
    variance = sum_ss.mul_(WINDOW).addcmul_(sum_s, sum_s, value=-1).add_(EPSILON)
    slope = covariance.float().div_(variance.float()).mul_(ONE).add_(0.5).floor_()
    return slope.clamp_(-ZERO, 255 - ZERO).add_(ZERO).short()


def beyond(x: Tensor, reach: int) -> Tensor:
    """[n, H, W, 3] with `reach` more pixels on every side."""
    count, height, width, colours = x.shape
    out = x.new_empty(count, height + 2 * reach, width + 2 * reach, colours)
    rows = out[:, reach:-reach]
    rows[:, :, reach:-reach] = x
    rows[:, :, :reach], rows[:, :, -reach:] = x[:, :, :1], x[:, :, -1:]
    out[:, :reach], out[:, -reach:] = rows[:, :1], rows[:, -1:]
    return out


def windows(x: Tensor, side: int) -> Tensor:
    """Sums over squares of `side` = 2^k neighbours, [..., H, W, 3] to [..., H - side + 1, ...]."""
    for axis in (-3, -2):
        size = 1
        while size < side:
            length = x.shape[axis] - size
            x = x.narrow(axis, 0, length) + x.narrow(axis, size, length)
            size *= 2
    return x
