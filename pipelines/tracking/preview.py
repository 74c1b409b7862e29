"""A picture or video as MLflow's pages can show it: as a picture, no wider than their column.

Their Markdown knows neither videos nor widths, but an animated picture plays there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data.video import probe, read_frames

COLUMN = 720  # pixels, of a window of 1366 beside MLflow's assistant
QUALITY = 70  # of WebP
VIDEOS = frozenset({".mp4"})


def preview(file: Path, folder: Path) -> Path:
    """`file` made small, in `folder`: a PNG of a picture, an animated WebP of a video."""
    if file.suffix not in VIDEOS:
        small = folder / f"{file.stem}-small.png"
        with Image.open(file) as picture:
            _narrow(picture).save(small)
        return small
    small = folder / f"{file.stem}-small.webp"
    frames = [_narrow(Image.fromarray(np.asarray(frame))) for frame in read_frames(file)]
    frames[0].save(
        small,
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / probe(file).fps),
        loop=0,
        quality=QUALITY,
    )
    return small


def _narrow(picture: Image.Image) -> Image.Image:
    if picture.width <= COLUMN:
        return picture.copy()
    return picture.resize(
        (COLUMN, round(picture.height * COLUMN / picture.width)), Image.Resampling.LANCZOS
    )
