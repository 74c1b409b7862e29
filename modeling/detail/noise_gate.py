"""What of an edit is one: where it differs from the source by no more than noise, the source stays.

A model's edit is a little off everywhere, also where the instruction says nothing: a few levels of
tone, another noise in every chunk. Its difference to the source, both as the VAE makes them, is
therefore kept only as far as its mean size in a window rises above what such errors reach:

    edit' = seen + share * (edit - seen),    share = (mean |edit - seen| - BELOW) / RISE from 0 to 1

The mean is over a window of 7 x 7, of the colour that moved most, so flat shifts and new texture
both count. It rises softly and the windows overlap, so no frame decides anything by a hair. Where
more than half of a picture is edited, little of its difference is noise, and both levels shrink to
nothing with what is left: a faint part of a new light is not taken for an error.

Nothing is remembered from frame to frame. Whole numbers, so that all devices agree to the bit.
Frames are uint8 [n, height, width, 3].
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.detail.transfer import beyond

REACH = 3  # pixels around each: a window of 7 x 7
WINDOW = (2 * REACH + 1) ** 2
BELOW, RISE = 8, 8  # levels: up to the first all is noise, above their sum all is edit
WHOLE = 64  # a share of 1
BITS = 6


def only_edited(seen: Tensor, edit: Tensor) -> Tensor:
    """`edit` with `seen` where it is not edited; both as the VAE makes them, of one size."""
    # One by one, because a frame and what is made of it fit in a core's cache.
    piece = 1 if edit.device.type == "cpu" else len(edit)
    pairs = zip(seen.split(piece), edit.split(piece), strict=True)
    return torch.cat([_gated(*pair) for pair in pairs])


def _gated(seen: Tensor, edit: Tensor) -> Tensor:
    moved = edit.short() - seen.short()
    most = around(moved.abs()).amax(dim=-1, keepdim=True).int()
    share = shares(most, torch.full_like(most[:, :1, :1], WHOLE))
    count = share[0].numel()
    edited = share.sum(dim=(1, 2), keepdim=True).div(count, rounding_mode="floor").int()
    share = shares(most, (2 * (WHOLE - edited)).clamp(max=WHOLE))
    kept = moved.int().mul_(share).add_(WHOLE // 2).bitwise_right_shift_(BITS)
    return kept.add_(seen).to(torch.uint8)


def shares(most: Tensor, strictness: Tensor) -> Tensor:
    """How much of the difference is kept, int32 [n, H, W, 1] from 0 to WHOLE, where a window's sum
    is `most`; `strictness` [n, 1, 1, 1] from 0 to WHOLE scales both levels."""
    below = (BELOW * WINDOW * strictness) >> BITS
    rise = ((RISE * WINDOW * strictness) >> BITS).clamp(min=1)
    share = ((most - below) * WHOLE).div(rise, rounding_mode="floor")
    return share.clamp(0, WHOLE).int()


def around(x: Tensor) -> Tensor:
    """Sums over windows of 2^k - 1 pixels around each of [n, H, W, 3], by doubling; of 255 levels
    they fit 16 bits."""
    x, side = beyond(x, REACH), 2 * REACH + 1
    for axis in (-3, -2):
        length = x.shape[axis] - side + 1
        total, run, size = x.narrow(axis, 0, length), x, 1
        while 2 * size <= side:
            whole = run.shape[axis] - size
            run = run.narrow(axis, 0, whole) + run.narrow(axis, size, whole)
            more = run.narrow(axis, 2 * size - 1, length)
            total = total + more if size == 1 else total.add_(more)  # at first it is x
            size *= 2
        x = total
    return x
