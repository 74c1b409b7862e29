"""How well a clip was edited, against the source and the ground truth.

F frames, H x W pixels. Clips are uint8 RGB `[F, H, W, 3]`, the edited region is bool `[F, H, W]`.
PSNR and SSIM are over the pixels of a region. With `e` the edit, `t` the ground truth and `s` the
source:

    gain                 PSNR(e, t) - PSNR(s, t)              inside the region, dB
    edited_psnr, _ssim   e against t                          inside the region
    source_psnr, _ssim   s against t, what doing nothing gets inside the region
    background_*         e against s; *_truth against t       outside the dilated region
    temporal_inside      mean |(e[i+1] - e[i]) - (t[i+1] - t[i])|   inside, grey levels (0 to 255)
    temporal_outside     mean |(e[i+1] - e[i]) - (s[i+1] - s[i])|   outside, grey levels
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

PSNR_CAP = 100.0  # dB; identical pixels would be infinite, which no table or JSON can hold

_BELL = [math.exp(-(n**2) / (2 * 1.5**2)) for n in range(-5, 6)]
_WINDOW = [weight / sum(_BELL) for weight in _BELL]


def clip_metrics(
    source: np.ndarray, edit: np.ndarray, truth: np.ndarray, mask: np.ndarray, *, dilate: int
) -> dict[str, float]:
    """The metrics named above for one clip; those of an empty region are left out."""
    if not source.shape == edit.shape == truth.shape or mask.shape != source.shape[:3]:
        raise ValueError(
            f"clips must have one shape, got source {source.shape}, edit {edit.shape}, "
            f"truth {truth.shape}, mask {mask.shape}"
        )
    s, e, t = (torch.from_numpy(clip).permute(0, 3, 1, 2).float() for clip in (source, edit, truth))
    inside = torch.from_numpy(mask).bool()  # [F, H, W]
    outside = ~grow(inside, dilate)
    values: dict[str, float] = {}
    if inside.any():
        values["edited_psnr"] = psnr(e, t, inside)
        values["edited_ssim"] = ssim(e, t, inside)
        values["source_psnr"] = psnr(s, t, inside)
        values["source_ssim"] = ssim(s, t, inside)
        values["gain"] = values["edited_psnr"] - values["source_psnr"]
    if outside.any():
        values["background_psnr"] = psnr(e, s, outside)
        values["background_ssim"] = ssim(e, s, outside)
        values["background_psnr_truth"] = psnr(e, t, outside)
        values["background_ssim_truth"] = ssim(e, t, outside)
    if inside[1:].any():
        values["temporal_inside"] = temporal_error(e, t, inside)
    if outside[1:].any():
        values["temporal_outside"] = temporal_error(e, s, outside)
    return values


def psnr(a: Tensor, b: Tensor, region: Tensor) -> float:
    """PSNR in dB of `[F, 3, H, W]` clips (0 to 255) over `region [F, H, W]`, at most PSNR_CAP."""
    square = float((a - b)[region[:, None].expand_as(a)].square().mean())
    return min(10 * math.log10(255**2 / square), PSNR_CAP) if square else PSNR_CAP


def ssim(a: Tensor, b: Tensor, region: Tensor) -> float:
    """Mean over `region` of the SSIM map of each frame."""
    full = ssim_map(a, b)
    return float(full[region[:, None].expand_as(full)].mean())


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """SSIM around every pixel of `[F, 3, H, W]` clips (0 to 255), [F, 3, H, W]: Wang et al.'s, with
    their Gaussian window and constants. H and W are at least 6."""
    fields = _around(torch.cat((a, b, a * a, b * b, a * b)))
    mean_a, mean_b, square_a, square_b, product = fields.chunk(5)
    both, squares = mean_a * mean_b, mean_a.square() + mean_b.square()
    variances = (square_a + square_b - squares).clamp(min=0)  # rounding must not make it negative
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * both + c1) * (2 * (product - both) + c2) / ((squares + c1) * (variances + c2))


def _around(values: Tensor) -> Tensor:
    """Means of `values [..., H, W]` around every pixel, the picture mirrored at its edges.

    One axis at a time and by additions: five times as fast as a convolution with the square."""
    reach = len(_WINDOW) // 2
    values = pad(values, (reach,) * 4, mode="reflect")
    for axis in (-2, -1):
        size = values.shape[axis] - 2 * reach
        mean = torch.zeros_like(values.narrow(axis, 0, size))
        for shift, weight in enumerate(_WINDOW):
            mean.add_(values.narrow(axis, shift, size), alpha=weight)
        values = mean
    return values


def temporal_error(a: Tensor, b: Tensor, region: Tensor) -> float:
    """Mean absolute difference of the frame-to-frame changes of two clips, in grey levels."""
    difference = (a.diff(dim=0) - b.diff(dim=0)).abs()
    return float(difference[region[1:, None].expand_as(difference)].mean())


def grow(region: Tensor, pixels: int) -> Tensor:
    """`region [F, H, W]` with `pixels` added on every side."""
    if not pixels:
        return region
    grown = region[:, None].float()
    for side in ((2 * pixels + 1, 1), (1, 2 * pixels + 1)):  # a square, one axis at a time
        grown = max_pool2d(grown, side, stride=1, padding=(side[0] // 2, side[1] // 2))
    return grown[:, 0].bool()


def summary(clips: Sequence[dict[str, float]], success_db: float) -> dict[str, float]:
    """Means over clips, and `success`: the share whose gain reaches `success_db`."""
    names = sorted({name for clip in clips for name in clip})
    values = {
        name: float(np.mean([clip[name] for clip in clips if name in clip])) for name in names
    }
    gains = [clip["gain"] for clip in clips if "gain" in clip]
    if gains:
        values["success"] = sum(gain >= success_db for gain in gains) / len(gains)
    return values
