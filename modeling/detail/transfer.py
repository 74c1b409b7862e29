"""The source's detail on an edit that was made at a smaller size.

The edit is a local linear function of the source as the editor sees it, colour by colour: its slope
in a window of both small pictures says how much of the source's detail the edit keeps (all of it
where nothing changed, half where contrast was halved, none of it under something new). That share
of what the small source lacks of the large one is added to the enlarged edit,

    out = up(edit) + up(gain) * (source - up(seen)).

"As the editor sees it" is the source after the VAE's own round trip: what the VAE loses is then
missing on both sides, and where nothing was changed the result is the source to the bit.
The slope is that of the guided filter (He et al. 2010), its use on another size that of joint
upsampling (Kopf et al. 2007).

A slope for each colour lets the grain of a colourful source come back as specks of colour on an
edit without any. So the added detail may not be more colourful than the edit: in every window the
slopes say how far the edit's colours should differ from each other, and where they differ less,
the detail's difference from its own grey is scaled down as much, never up.

Everything is whole numbers, so that all devices agree to the bit.
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
EPSILON = FLAT * WINDOW * WINDOW  # in the units of `_windows`
ONE = 64  # a gain of 1 in the numbers of `slopes_and_caps`
STRIP = 64  # rows
ALL = 32  # all of the detail's colour, in the same numbers
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
    slopes, caps = slopes_and_caps(seen, edit)
    gain = resize(means(slopes), height, width, "bilinear")
    capped = bool((caps < ALL).any())  # else it is done sooner
    cap = resize(means(caps), height, width, "bilinear") if capped else None
    seen, edit = (resize(small, height, width, "bicubic") for small in (seen, edit))
    out = torch.empty_like(source)
    for strip in _strips(height):
        detail = source[:, strip].short().sub_(seen[:, strip].short())
        # Fits 16 bits: at most 255 levels by 128.
        detail.mul_(gain[:, strip].short().sub_(ZERO)).add_(ONE // 2).bitwise_right_shift_(6)
        if cap is not None and bool(cap[:, strip].min() < ALL):
            _calm(detail, cap[:, strip])
        out[:, strip] = detail.add_(edit[:, strip].short()).clamp_(0, 255)
    return out


def _calm(detail: Tensor, cap: Tensor) -> None:
    """Scales what differs from grey, 21 / 64 of the colours' sum, by cap / ALL, in place."""
    red, green, blue = detail.unbind(-1)
    grey = (red + green).add_(blue).mul_(21).add_(32).bitwise_right_shift_(6)  # fits: 1530 by 21
    less = cap[..., 0].short().neg_().add_(ALL)
    for colour in (red, green, blue):
        # Fits 16 bits: at most 700 levels by 32.
        colour.add_((grey - colour).mul_(less).add_(ALL // 2).bitwise_right_shift_(5))


def _strips(height: int) -> list[slice]:
    """Rows that are worked on at once: what is made of them stays in a core's cache."""
    return [slice(top, min(top + STRIP, height)) for top in range(0, height, STRIP)]


def slopes_and_caps(seen: Tensor, edit: Tensor) -> tuple[Tensor, Tensor]:
    """What windows around each pixel say, both uint8 like `seen`.

    The share of the source's detail that the edit keeps, as ZERO + ONE * share: the slope of e on
    s, (cov(s, e) + FLAT) / (var(s) + FLAT). And the share of its colour that this detail keeps, as
    ALL * share, three times the same: the root of E / P, at most 1, where E is var(red - green) +
    var(blue - green) of e, and P that of s times the slopes. Pictures go on beyond their border
    with its last pixel.
    """
    padded = torch.stack([beyond(seen, REACH), beyond(edit, REACH)])
    slopes, caps = torch.empty_like(seen), torch.empty_like(seen)
    for strip in _strips(seen.shape[1]):
        s, e = padded[:, :, strip.start : strip.stop + 2 * REACH].int()
        slopes[:, strip], caps[:, strip] = _windows(s, e)
    return slopes, caps


def means(x: Tensor) -> Tensor:
    """Rounded means of 3 x 3."""
    mean = sums(beyond(x, 1).short(), 3).add_(4).float().div_(9)  # and cut off
    return mean.to(torch.uint8)


def _windows(s: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Of windows around all pixels but REACH at each border: [n, H, W, 3] and [n, H, W, 1]."""
    sum_s, sum_e, sum_ss, sum_se = sums(torch.stack([s, e, s * s, s * e]), 2 * REACH + 1)
    covariance = sum_se.mul_(WINDOW).addcmul_(sum_s, sum_e, value=-1).add_(EPSILON)
    variance = sum_ss.mul_(WINDOW).addcmul_(sum_s, sum_s, value=-1)
    quotient = covariance.float().mul_(ONE).div_((variance + EPSILON).float())
    slope = quotient.add_(0.5).floor_().clamp_(-ZERO, 255 - ZERO)
    return slope + ZERO, _cap(s, e, sum_s, sum_e, variance, slope).unsqueeze(-1)


def _cap(
    s: Tensor, e: Tensor, sum_s: Tensor, sum_e: Tensor, variance: Tensor, slope: Tensor
) -> Tensor:
    """[n, H, W] from 0 to ALL."""
    (red, green, blue), (e_red, e_green, e_blue) = s.unbind(-1), e.unbind(-1)
    apart = (e_red - e_green).square_().add_((e_blue - e_green).square_())
    products = torch.stack([red * green, blue * green, apart]).unsqueeze(-1)
    *beside, apart = sums(products, 2 * REACH + 1).squeeze(-1)
    found = apart.mul_(WINDOW)
    # Whole numbers below 2^53, so float64 is exact, in any order.
    said = torch.zeros_like(found, dtype=torch.float64)
    a_green = slope[..., 1].double()
    for colour, product in zip((0, 2), beside, strict=True):
        differ = sum_e[..., colour] - sum_e[..., 1]
        found.addcmul_(differ, differ, value=-1)
        shared = product.mul_(WINDOW).addcmul_(sum_s[..., colour], sum_s[..., 1], value=-1)
        a = slope[..., colour].double()
        # var(a s - g green) = a (a var(s) - 2 g cov(s, green)) + g^2 var(green)
        said += (a * variance[..., colour]).sub_(a_green * shared, alpha=2).mul_(a)
        said += (a_green * a_green).mul_(variance[..., 1])
    # One more of each, so that where neither has any colour all of it is kept.
    share = (found + 1).float().mul_(ONE * ONE).div_((said + ONE * ONE).float())
    return share.sqrt_().mul_(ALL).add_(0.5).floor_().clamp_(max=ALL)


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
