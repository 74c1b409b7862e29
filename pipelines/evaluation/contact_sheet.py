"""Edited clips to look at: which of them, as one picture of a few frames, and as a video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.video import VideoWriter
from pipelines.evaluation.evaluate import EditedClip

FRAMES = 5  # columns
_GAP, _LABEL, _TITLE = 4, 96, 22  # pixels
_INK, _PAPER, _REUSED = (30, 30, 30), (255, 255, 255), (40, 44, 52)


def chosen(clips: Sequence[Mapping[str, Any]], success_db: float) -> dict[int, str]:
    """Of a report's clips by their gain: the typical one (the median), the best and the worst, as
    place and what it is. The first clip where none was to be changed."""
    ranked = sorted((clip["gain"], place) for place, clip in enumerate(clips) if "gain" in clip)
    if not ranked:
        return {0: "Nothing to do"}
    gain, last = ranked[0]
    failed = f"Failed: below {success_db:g} dB" if gain < success_db else "The worst"
    names = {ranked[len(ranked) // 2][1]: "Typical"}
    for place, name in ((ranked[-1][1], "Best"), (last, failed)):
        names.setdefault(place, name)
    return names


def film(file: Path, clip: EditedClip, fps: float) -> None:
    """Source, edit and truth beside each other."""
    frames = np.concatenate([clip.source, clip.edit, clip.truth], axis=2)
    _, height, width, _ = frames.shape
    with VideoWriter(file, width, height, fps) as writer:
        writer.write(frames)


def side_by_side(clips: Sequence[EditedClip], names: Sequence[str] = ()) -> Image.Image:
    """One block a clip: a title, with its name, and four labelled rows of `FRAMES` evenly spread
    frames."""
    blocks = [
        _block(clip, name) for clip, name in zip(clips, names or [""] * len(clips), strict=True)
    ]
    width = max(block.width for block in blocks)
    picture = Image.new("RGB", (width, sum(block.height for block in blocks)), _PAPER)
    top = 0
    for block in blocks:
        picture.paste(block, (0, top))
        top += block.height
    return picture


def recomputed_view(clip: EditedClip) -> np.ndarray:
    """The edit where tokens were computed anew, dark where they were reused; uint8 [F, H, W, 3]."""
    return np.where(clip.recomputed[..., None], clip.edit, np.array(_REUSED, np.uint8))


def _block(clip: EditedClip, name: str) -> Image.Image:
    frames, height, width, _ = clip.source.shape
    picked = np.linspace(0, frames - 1, min(FRAMES, frames)).round().astype(int)
    share = clip.metrics["recomputed"]
    rows = {
        "source": clip.source,
        "edit": clip.edit,
        "ground truth": clip.truth,
        f"recomputed\n{share:.0%} of tokens": recomputed_view(clip),
    }
    font = ImageFont.load_default(12)
    size = (
        _LABEL + len(picked) * (width + _GAP),
        _TITLE + len(rows) * (height + _GAP) + 2 * _GAP,
    )
    block = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(block)
    gain = clip.metrics.get("gain")
    numbers = "" if gain is None else f"   ({gain:+.1f} dB in the edited region)"
    title = f"{name}   " if name else ""
    draw.text((_GAP, _GAP), f'{title}"{clip.instruction}"{numbers}', _INK, font)
    for row, (label, pictures) in enumerate(rows.items()):
        top = _TITLE + row * (height + _GAP)
        draw.text((_GAP, top + height // 2 - 14), label, _INK, font)
        for column, frame in enumerate(picked):
            left = _LABEL + column * (width + _GAP)
            block.paste(Image.fromarray(pictures[frame]), (left, top))
            if row == 0:
                draw.text((left + 3, top + 2), f"frame {frame}", _PAPER, font, stroke_width=1,
                          stroke_fill=_INK)  # fmt: skip
    return block
