"""What editing small and showing sharp costs, against exact truth: `liveedit bench detail`.

Pairs of held-out footage at the size that is shown hold the exact edit. An ideal editor of a
smaller size makes that edit and blurs it, as VAEs do, by a Gaussian of one of its pixels; it sees
the source through the same blur. What comes back, enlarged or with the source's detail, is compared
with the truth. Frames are uint8 [F, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.footage.material import Footage
from data.footage.pair import make_footage_pair
from data.sample import Pair
from modeling.detail.resample import resize
from modeling.detail.transfer import transfer
from modeling.detail.work_size import work_size
from pipelines.evaluation.scores import ssim_map

WORK_SIZES = ("full", "1/2", "1/4")
SEEDS = 400  # are tried to find every kind


def pairs_by_kind(
    footage: Footage, kinds: tuple[str, ...], *, height: int, width: int, frames: int
) -> Iterator[tuple[str, Pair]]:
    """The first pair of every kind (or look) in the order of seeds.

    ValueError for a kind that none of them has.
    """
    wanted = set(kinds)
    for seed in range(SEEDS):
        if not wanted:
            return
        small = make_footage_pair(seed, footage, height=48, width=80, frames=2)
        kind = str(small.origin.get("look", small.origin["kind"]))
        if kind in wanted and "second" not in small.origin:
            pair = make_footage_pair(seed, footage, height=height, width=width, frames=frames)
            if str(pair.origin.get("look", pair.origin["kind"])) == kind:
                wanted.discard(kind)
                yield kind, pair
    if wanted:
        raise ValueError(f"no pair of {SEEDS} is of kind {', '.join(sorted(wanted))}")


def compare(
    pair: Pair, note: Callable[[str, Tensor], None] = lambda way, frames: None
) -> dict[str, Any]:
    """Every way's figures of one pair; `note` is given the frames of each way."""
    source, truth = torch.from_numpy(pair.source), torch.from_numpy(pair.target)
    changed = None if pair.mask is None else torch.from_numpy(np.asarray(pair.mask))
    height, width = source.shape[1:3]
    found = {"as it is": figures(source, truth, changed)}
    for choice in WORK_SIZES:
        size = work_size(choice, height, width)
        seen, edit = (blurred(resize(frames, *size)) for frames in (source, truth))
        ways = {
            f"{choice}, enlarged": resize(edit, height, width),
            f"{choice}, detail": transfer(source, seen, edit),
        }
        for way, frames in ways.items():
            note(way, frames)
            found[way] = figures(frames, truth, changed)
    return found


def blurred(frames: Tensor) -> Tensor:
    """A Gaussian of one pixel, borders repeated."""
    weights = torch.exp(-torch.arange(-3, 4.0).square() / 2)
    weights /= weights.sum()
    x = F.pad(frames.permute(0, 3, 1, 2).float(), (3, 3, 3, 3), mode="replicate")
    for shape in ((1, 1, 7, 1), (1, 1, 1, 7)):
        x = F.conv2d(x, weights.view(shape).expand(3, -1, -1, -1), groups=3)
    return x.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def figures(found: Tensor, truth: Tensor, changed: Tensor | None) -> dict[str, float]:
    """PSNR in dB and SSIM over all, where the edit changed the source, and elsewhere; sharpness,
    the share of the truth's fine detail (energy of the Laplacian); flicker, the mean levels by
    which changes from frame to frame are off.
    """
    a, b = found.double(), truth.double()
    square = (a - b).square()
    values = {"psnr": psnr(square), "sharpness": _fine(a) / max(_fine(b), 1e-9)}
    alike = ssim_map(*(frames.permute(0, 3, 1, 2).float() for frames in (found, truth)))
    alike = alike.mean(dim=1)  # [F, H, W]
    values["ssim"] = float(alike.mean())
    if len(a) > 1:
        values["flicker"] = float((a.diff(dim=0) - b.diff(dim=0)).abs().mean())
    if changed is not None and changed.any() and not changed.all():
        values |= {"inside": psnr(square[changed]), "outside": psnr(square[~changed])}
        values["ssim inside"] = float(alike[changed].mean())
        values["ssim outside"] = float(alike[~changed].mean())
    return values


def psnr(square: Tensor) -> float:
    """Of squared errors in levels; 99 dB where there are none."""
    return min(99.0, float(10 * torch.log10(255**2 / square.mean().clamp(min=1e-9))))


def _fine(frames: Tensor) -> float:
    x = frames.mean(dim=-1)
    middle = x[:, 1:-1, 1:-1]
    around = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    return float((4 * middle - around).square().mean())


def table(rows: dict[str, dict[str, Any]], figure: str) -> str:
    """One figure of all pairs as Markdown, ways across, and their mean."""
    ways = list(next(iter(rows.values())))
    lines = [f"| {figure} | {' | '.join(ways)} |", "| --- |" + " --- |" * len(ways)]
    for kind, found in rows.items():
        cells = (f"{found[way][figure]:.4g}" if figure in found[way] else "" for way in ways)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    means = []
    for way in ways:
        values = [found[way][figure] for found in rows.values() if figure in found[way]]
        means.append(f"{np.mean(values):.4g}" if values else "")
    return "\n".join([*lines, f"| mean | {' | '.join(means)} |"])


def save_picture(path: Path, frames: list[Tensor]) -> None:
    """Frames [H, W, 3] beside each other."""
    from PIL import Image

    Image.fromarray(torch.cat(frames, dim=1).numpy()).save(path, quality=88)
