"""Snow and rain that fall through a video: no two alike, so only their look can be learned."""

from __future__ import annotations

import numpy as np

from data.footage.looks import cold, grey


def snow(video: np.ndarray, amount: float, unit: float, rng: np.random.Generator) -> np.ndarray:
    """White flakes over a pale, cold picture; float32 [F, H, W, 3] in 0 to 255."""
    pale = cold(video + (grey(video) - video) * np.float32(0.35), 0.5, unit)
    pale = pale + (222 - pale) * np.float32(0.16 * min(amount, 1.3))
    flakes = _fall(video.shape, 0.006 * amount, (0.8, 2.4), 0.4, 1, unit, rng)
    return pale + (250 - pale) * flakes


def rain(video: np.ndarray, amount: float, unit: float, rng: np.random.Generator) -> np.ndarray:
    """Slanting streaks over a grey, dim picture."""
    dim = (video + (grey(video) - video) * np.float32(0.5)) * np.float32(0.82)
    streaks = _fall(video.shape, 0.0022 * amount, (5.0, 9.0), 0.12, 7, unit, rng)
    return dim + (200 - dim) * streaks * np.float32(0.55)


def _fall(
    shape: tuple[int, ...],
    density: float,
    speeds: tuple[float, float],
    drift: float,
    length: int,
    unit: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Cover [F, H, W, 1] in 0 to 1 of drops, `density` a pixel at height 128, that fall by
    `speeds` pixels a frame and are `length` pixels long."""
    frames, height, width = shape[:3]
    count = max(1, int(density * height * width / unit**2))
    x, y = rng.uniform(0, width, count), rng.uniform(0, height, count)
    speed = rng.uniform(*speeds, count) * unit
    size = rng.uniform(0.35, 1.0, count)
    cover = np.zeros((frames, height, width), np.float32)
    tail = np.arange(max(1, round(length * unit)))
    for n in range(frames):
        rows = np.floor(y + speed * n)[:, None] - tail
        columns = np.floor(x + drift * speed * n + np.sin(y + 0.3 * n))[:, None] + drift * tail
        at = rows.astype(int) % height, columns.astype(int) % width
        np.maximum.at(cover[n], at, np.broadcast_to(size[:, None], rows.shape).astype(np.float32))
    around = (np.roll(cover, 1, 1) + np.roll(cover, 1, 2)) * np.float32(0.4)
    return np.minimum(np.maximum(cover, around), 1)[..., None]
