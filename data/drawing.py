"""Shapes, textures and motions of the synthetic pairs: numpy only, exact edges, fast.

Units: pixels and frames. `F` frames, `H` `W` picture size. A shape is a signed distance (negative
inside), so its anti-aliased coverage is one clip and its outline one subtraction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Field = np.ndarray  # float64, any shape


def _box(x: Field, y: Field, half_w: float, half_h: float) -> Field:
    return np.maximum(np.abs(x) - half_w, np.abs(y) - half_h)


def _triangle(x: Field, y: Field, r: float) -> Field:
    slope = np.sqrt(0.75)
    return np.maximum(y, np.maximum(slope * x, -slope * x) - 0.5 * y) - 0.55 * r


def _star(x: Field, y: Field, r: float) -> Field:
    # Five tips: fold the plane onto one half tip, then take the distance to its only edge.
    wedge = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    tip, notch = 1.15 * r, 0.52 * r
    edge_x, edge_y = notch * np.cos(wedge) - tip, notch * np.sin(wedge)
    return ((along - tip) * edge_y - across * edge_x) / np.hypot(edge_x, edge_y)


SHAPES: dict[str, Callable[[Field, Field, float], Field]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: _box(x, y, 0.86 * r, 0.86 * r),
    "triangle": _triangle,
    "star": _star,
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r,
    "cross": lambda x, y, r: np.minimum(_box(x, y, r, 0.34 * r), _box(x, y, 0.34 * r, r)),
}


def coverage(distance: Field) -> Field:
    """Share of each pixel that lies inside, from the signed distance of its centre."""
    return np.clip(0.5 - distance, 0, 1)


def paste(video: np.ndarray, centres: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> None:
    """Blends patches into a float video in place, cut at its borders.

    video `[F, H, W, 3]`, centres `[F, 2]` (x, y; rounded down they are the patch's middle pixel),
    colour `[F, P, P, 3]`, alpha `[F, P, P]` with odd P.
    """
    height, width = video.shape[1:3]
    reach = alpha.shape[1] // 2
    for frame, (cx, cy), paint, share in zip(
        video, np.floor(centres).astype(int), colour, alpha, strict=True
    ):
        top, left = cy - reach, cx - reach
        y0, y1 = max(0, top), min(height, cy + reach + 1)
        x0, x1 = max(0, left), min(width, cx + reach + 1)
        if y0 >= y1 or x0 >= x1:
            continue
        inner = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
        region = frame[y0:y1, x0:x1]
        region += (paint[inner] - region) * share[inner][..., None]


def _upsample(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Smooth (cosine-weighted) enlargement of a coarse grid to `[height, width]`."""
    rows = np.linspace(0, grid.shape[0] - 1.001, height)
    columns = np.linspace(0, grid.shape[1] - 1.001, width)
    i, j = rows.astype(int), columns.astype(int)
    v = (0.5 - 0.5 * np.cos(np.pi * (rows - i)))[:, None]
    u = (0.5 - 0.5 * np.cos(np.pi * (columns - j)))[None]
    top = grid[i][:, j] * (1 - u) + grid[i][:, j + 1] * u
    low = grid[i + 1][:, j] * (1 - u) + grid[i + 1][:, j + 1] * u
    return top * (1 - v) + low * v


def texture(kind: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """One of TEXTURES as weights in [0, 1], `[height, width]`, without hard edges."""
    y, x = np.mgrid[0:height, 0:width] / min(height, width)
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    if kind == "gradient":
        return (along - along.min()) / np.ptp(along)
    if kind == "stripes":
        return 0.5 + 0.5 * np.sin(2 * np.pi * along * rng.uniform(1.5, 3.5))
    if kind == "checker":
        pitch = rng.uniform(1.2, 2.2)
        waves = np.sin(2 * np.pi * along * pitch) * np.sin(2 * np.pi * across * pitch)
        return 0.5 + 0.5 * np.tanh(3 * waves)
    if kind == "blobs":
        field = np.zeros((height, width))
        for _ in range(int(rng.integers(4, 8))):
            cx, cy = rng.uniform(0, x.max()), rng.uniform(0, y.max())
            spread = rng.uniform(0.12, 0.35)
            field += np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * spread**2))
        return np.clip(field, 0, 1)
    assert kind == "noise", kind
    coarse = _upsample(rng.random((4, 6)), height, width)
    fine = _upsample(rng.random((9, 13)), height, width)
    return 0.65 * coarse + 0.35 * fine


TEXTURES = ("gradient", "blobs", "stripes", "checker", "noise")


def bounce(position: Field, low: float, high: float) -> Field:
    """Reflects a straight path between two walls."""
    span = max(high - low, 1e-6)
    return low + span - np.abs((position - low) % (2 * span) - span)


def motion(
    kind: str,
    frames: int,
    fps: float,
    area: tuple[float, float, float, float],
    pan: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Centres `[F, 2]` (x, y) of one of MOTIONS inside `area` (left, top, right, bottom).

    `pan` `[F, 2]` is how far the camera moved the background; a still object goes along with it.
    """
    left, top, right, bottom = area
    time = np.arange(frames) / fps  # seconds
    middle = np.array([(left + right) / 2, (top + bottom) / 2])
    half = np.array([(right - left) / 2, (bottom - top) / 2])
    phase, way = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
    start = middle + half * rng.uniform(-1, 1, 2)
    # Slow enough for chunks of 12 frames to overlap: a third to one width of the area a second.
    rate = rng.uniform(0.35, 1.0) * way
    if kind == "linear":
        direction = np.array([np.cos(phase), np.sin(phase)]) * np.linalg.norm(half)
        path = start + direction * rate * time[:, None]
    elif kind == "circular":
        turn = phase + 2 * np.pi * rate * 0.5 * time
        path = middle + 0.8 * half * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    elif kind == "zigzag":
        across = start[0] + half[0] * rate * time
        path = np.stack([across, start[1] + 1.6 * half[1] * abs(rate) * time], axis=1)
    elif kind == "swing":
        swing = 0.9 * np.sin(phase + 2 * np.pi * rate * 0.6 * time)
        drop = np.cos(swing * np.pi / 2) - 0.5
        path = middle + half * np.stack([swing, drop], axis=1)
    else:
        assert kind == "still", kind
        path = start + pan
    return np.stack([bounce(path[:, 0], left, right), bounce(path[:, 1], top, bottom)], axis=1)


MOTIONS = ("linear", "circular", "zigzag", "swing", "still")
