"""What is measured of one edited clip of the benchmark.

F frames, H x W pixels, uint8 RGB; e the edit, t the truth, s the source; inside is where s and t
differ, outside what is farther than `dilate` pixels from there. Only regions of some size count.

    gain                PSNR(e, t) - PSNR(s, t) inside, dB: how much better than doing nothing
    edited_psnr, _ssim  e against t inside
    background_*        e against s outside
    kept_psnr           e against s everywhere, where nothing was to be done
    false_edits         share of 8 x 8 blocks outside whose mean colour moved by over 16 levels
    temporal_inside     mean |d[n+1] - W d[n]|, d = e - t, W the known motion of what is edited
    temporal_outside    the same of d = e - s outside, W the camera's motion; grey levels
    sharpness           strength of e's gradients over t's, whole picture; 1 is right
    drift               PSNR(e, t) of the first 15 % of frames less that of the last, whole picture

The temporal error is of the difference to the truth, followed along the motion: an edit that is
wrong in the same way in every frame flickers by nothing, one that swims by what is seen of it.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.bench.clip import BenchClip
from pipelines.evaluation.scores import PSNR_CAP, grow, ssim_map

STRETCH = 64  # frames measured at a time
LEAST = 0.002  # share of the clip from which the inside counts
LEAST_OUTSIDE = 0.05
BLOCK, FALSE = 8, 16.0  # pixels, levels
ENDS = 0.15


def measure(clip: BenchClip, edit: np.ndarray, *, dilate: int) -> dict[str, float]:
    """The metrics above that the clip has; ValueError if `edit` is not as the source is."""
    if edit.shape != clip.source.shape or edit.dtype != np.uint8:
        raise ValueError(
            f"{clip.case.name}: the edit is {edit.dtype} {edit.shape}, the source "
            f"{clip.source.dtype} {clip.source.shape}"
        )
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    by_frame = []
    for first in range(0, len(edit), STRETCH):
        last = min(first + STRETCH, len(edit))
        _add_stretch(totals, clip, edit, first, last, dilate)
        by_frame.append(square_by_frame(edit[first:last], clip.truth[first:last]))
    share = {name: float(total[1]) / edit[..., 0].size for name, total in totals.items()}
    inside = share["inside"] >= LEAST
    outside = share["outside"] >= LEAST_OUTSIDE
    values: dict[str, float] = {}
    mean = {name: float(total[0] / total[1]) for name, total in totals.items() if total[1] > 0}
    if inside:
        values["edited_psnr"] = _psnr(mean["edited"])
        values["source_psnr"] = _psnr(mean["source"])
        values["gain"] = values["edited_psnr"] - values["source_psnr"]
        values["edited_ssim"] = mean["edited_ssim"]
    if outside and clip.case.kind == "nothing":
        values["kept_psnr"] = _psnr(mean["background"])
    elif outside:
        values["background_psnr"] = _psnr(mean["background"])
        values["background_ssim"] = mean["background_ssim"]
    for name, there in (("inside", inside), ("outside", outside)):
        if there and f"temporal_{name}" in mean:
            values[f"temporal_{name}"] = mean[f"temporal_{name}"]
    if outside and "false_edits" in mean:
        values["false_edits"] = mean["false_edits"]
    if mean["truth_gradient"] > 0:
        values["sharpness"] = mean["edit_gradient"] / mean["truth_gradient"]
    squares = np.concatenate(by_frame)
    ends = max(1, round(ENDS * len(squares)))
    values["drift"] = _psnr(squares[:ends].mean()) - _psnr(squares[-ends:].mean())
    return values


def square_by_frame(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean square difference of each frame of two uint8 clips, [F]."""
    return np.square(a.astype(np.float32) - b).mean(axis=(1, 2, 3), dtype=np.float64)


def psnr_by_second(clip: BenchClip, edit: np.ndarray, fps: int) -> list[float]:
    """PSNR against the truth of every second, dB."""
    squares = square_by_frame(edit, clip.truth)
    return [_psnr(squares[n : n + fps].mean()) for n in range(0, len(squares), fps)]


def along(video: Tensor, motion: np.ndarray) -> tuple[Tensor, Tensor]:
    """Frames moved on by `motion` [F, 2, 3], where a pixel of the result was in the video
    [F, C, H, W]; and which pixels were in the picture, [F, H, W]."""
    height, width = video.shape[2:]
    size = torch.tensor([width, height], dtype=torch.float64)
    x, y = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (width, height))
    at = torch.stack(
        [x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width)], -1
    )
    was = torch.einsum("hwc,fdc->fhwd", at, torch.tensor(motion))
    seen = ((was >= 0.5) & (was <= size - 0.5)).all(dim=-1)  # NaN, across a cut, is not seen
    grid = (2 * was.nan_to_num() / size - 1).float()
    return F.grid_sample(video, grid, align_corners=False), seen


def _add_stretch(
    totals: dict[str, Tensor],
    clip: BenchClip,
    edit: np.ndarray,
    first: int,
    last: int,
    dilate: int,
) -> None:
    """Add frames `first` up to `last` to [sum, count] of everything."""
    before = max(first - 1, 0)  # one more frame in front, for what changes between frames
    new = slice(first - before, None)
    s, e, t = (
        torch.from_numpy(video[before:last]).permute(0, 3, 1, 2).float()
        for video in (clip.source, edit, clip.truth)
    )
    inside = (s != t).any(dim=1)
    outside = ~grow(inside, dilate)

    def add(name: str, values: Tensor, region: Tensor) -> None:
        """values [n, (C,) H, W] over region [n, H, W]"""
        if values.dim() == 4:
            values = values.mean(dim=1)
        picked = values[region]
        totals[name] += torch.tensor([picked.double().sum(), picked.numel()])

    add("inside", inside[new].float(), inside[new])
    add("outside", outside[new].float(), outside[new])
    add("edited", (e - t).square()[new], inside[new])
    add("source", (s - t).square()[new], inside[new])
    add("background", (e - s).square()[new], outside[new])
    for name, other, region in (("edited", t, inside), ("background", s, outside)):
        if region[new].any():  # the SSIM is most of a measurement's time
            add(f"{name}_ssim", ssim_map(e[new], other[new]), region[new])
    everywhere = torch.ones_like(inside[new])
    add("edit_gradient", _gradient(e[new]), everywhere[:, 1:, 1:])
    add("truth_gradient", _gradient(t[new]), everywhere[:, 1:, 1:])
    blocks = F.avg_pool2d(e[new] - s[new], BLOCK).abs().amax(dim=1) > FALSE
    whole = F.avg_pool2d(outside[new].float()[:, None], BLOCK)[:, 0] == 1
    add("false_edits", blocks.float(), whole)
    motions = slice(before, last - 1)
    for name, d, region, motion in (
        ("temporal_inside", e - t, inside, clip.edited[motions]),
        ("temporal_outside", e - s, outside, clip.camera[motions]),
    ):
        moved, seen = along(d[:-1], motion)
        add(name, (d[1:] - moved).abs(), region[1:] & seen)


def _gradient(video: Tensor) -> Tensor:
    """Strength of the brightness gradient, [F, H - 1, W - 1]."""
    light = video.mean(dim=1)
    return torch.hypot(light[:, 1:, 1:] - light[:, 1:, :-1], light[:, 1:, 1:] - light[:, :-1, 1:])


def _psnr(square: float) -> float:
    return PSNR_CAP if square <= 0 else min(PSNR_CAP, 10 * float(np.log10(255**2 / square)))
