"""How well a clip was edited, against the source and the ground truth.

F frames, H x W pixels. Clips are uint8 RGB `[F, H, W, 3]`, the edited region is bool `[F, H, W]`.
PSNR and SSIM are torchmetrics' own, over the pixels of a region. With `e` the edit, `t` the ground
truth and `s` the source:

    gain                 PSNR(e, t) - PSNR(s, t)              inside the region, dB
    edited_psnr, _ssim   e against t                          inside the region
    source_psnr, _ssim   s against t, what doing nothing gets inside the region
    background_*         e against s; *_truth against t       outside the dilated region
    temporal_inside      mean |(e[i+1] - e[i]) - (t[i+1] - t[i])|   inside, grey levels (0 to 255)
    temporal_outside     mean |(e[i+1] - e[i]) - (s[i+1] - s[i])|   outside, grey levels
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

PSNR_CAP = 100.0  # dB; identical pixels would be infinite, which no table or JSON can hold


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
    picked = region[:, None].expand_as(a)
    value = float(peak_signal_noise_ratio(a[picked], b[picked], data_range=255.0))
    return min(value, PSNR_CAP)


def ssim(a: Tensor, b: Tensor, region: Tensor) -> float:
    """Mean over `region` of the SSIM map of each frame."""
    full = ssim_map(a, b)
    return float(full[region[:, None].expand_as(full)].mean())


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """SSIM around every pixel, [F, 3, H, W]."""
    _, full = structural_similarity_index_measure(a, b, data_range=255.0, return_full_image=True)
    return full


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
