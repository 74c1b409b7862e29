"""A moving view of a photo or a clip: what a hand-held or resting camera would have filmed.

F frames of H x W pixels. Positions are (x, y) in pixels of the material's first level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.footage.material import Material
from infra.runtime.errors import UserError

CLOSEST = 0.5  # material pixels a view's pixel, at the least: closer would show only blur
RESTING = {"photo": 0.25, "clip": 0.75}  # share of cameras that do not move


@dataclass(frozen=True)
class Path:
    """Where the camera is in every frame."""

    centres: np.ndarray  # [F, 2]
    scales: np.ndarray  # [F] material pixels a view's pixel
    angles: np.ndarray  # [F] radians
    mirrored: bool


def film(
    material: Material, frames: int, height: int, width: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A view as uint8 [F, H, W, 3], and how far its content moved since its middle frame, [F, 2]
    in pixels of the view (x, y).
    """
    length, tall, wide = material.level(0).shape[:3]
    fit = min(tall / height, wide / width)  # the whole picture
    closest = min(max(CLOSEST, fit / 6), fit)
    scale = fit * rng.uniform(0.75, 1.0) if rng.random() < 0.4 else _between(closest, fit, rng)
    path = _path(material.kind, frames, (height, width), (tall, wide), scale, rng)
    level = min(max(0, round(np.log2(scale))), len(material.levels) - 1)
    pictures = material.level(level)
    first, step = _stretch(length, frames, rng)
    view = shoot(pictures, first + step * np.arange(frames), path, 2**level, height, width)
    return view, drift(path)


def shoot(
    pictures: np.ndarray, shown: np.ndarray, path: Path, step: int, height: int, width: int
) -> np.ndarray:
    """What the camera sees, uint8 [F, H, W, 3]: frame n is of `pictures[shown[n]]`, which are
    uint8 [P, h, w, 3] at 1 / `step` of the size that `path` is in."""
    view = np.empty((len(shown), height, width, 3), np.uint8)
    image = Image.fromarray(pictures[shown[0]])
    for n, number in enumerate(shown):
        if n and number != shown[n - 1]:
            image = Image.fromarray(pictures[number])
        coefficients = affine(path, n, step, height, width)
        seen = image.transform(
            (width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
        )
        view[n] = np.asarray(seen)
    return view


def drift(path: Path) -> np.ndarray:
    """How far the content moved since the middle frame, [F, 2] in pixels of the view (x, y)."""
    away = (path.centres[len(path.centres) // 2] - path.centres) / path.scales[:, None]
    return away * ((-1, 1) if path.mirrored else (1, 1))


def _stretch(length: int, frames: int, rng: np.random.Generator) -> tuple[int, int]:
    """First frame and step (1, 2, or -1 backwards) of a clip's stretch; a photo stays at 0."""
    if length == 1:
        return 0, 0
    if length < frames:
        raise UserError(f"a clip of {length} frames is too short for pairs of {frames}")
    pace = 2 if length >= 2 * frames and rng.random() < 0.25 else 1
    first = int(rng.integers(length - pace * (frames - 1)))
    return (first + pace * (frames - 1), -pace) if rng.random() < 0.2 else (first, pace)


def _path(
    kind: str,
    frames: int,
    view: tuple[int, int],
    picture: tuple[int, int],
    scale: float,
    rng: np.random.Generator,
) -> Path:
    time = np.arange(frames) - (frames - 1) / 2
    resting = rng.random() < RESTING[kind]
    speed = 0.0 if resting else min(rng.exponential(1.3), 6.0)  # pixels of the view a frame
    sway = 0.0 if resting else rng.exponential(1.5)
    zoom, turn = (0.0, 0.0) if resting else rng.normal(0, 0.003, 2)  # a frame
    heading, phase = rng.uniform(0, 2 * np.pi, 2)
    rate = rng.uniform(0.1, 0.5)
    tilt = rng.normal(0, 0.05) if rng.random() < 0.4 else 0.0
    angles = tilt + turn * time
    scales = scale * np.exp(zoom * time)
    # Half of what the turned view needs of the picture; what does not fit is brought closer.
    half = np.array([view[1], view[0]]) / 2  # (x, y)
    cos, sin = np.abs(np.cos(angles)), np.abs(np.sin(angles))
    need = np.stack([half[0] * cos + half[1] * sin, half[0] * sin + half[1] * cos], axis=1)
    room = np.array([picture[1], picture[0]]) / 2 - 1
    scales = scales * min(1.0, float((room / (need * scales[:, None])).min()))
    free = (room - need * scales[:, None]).clip(0)  # [F, 2]
    wander = np.array([np.cos(heading), np.sin(heading)]) * speed * time[:, None]
    wander = wander + sway * np.stack(
        [np.sin(phase + rate * time), np.cos(phase + 0.7 * rate * time)], axis=1
    )
    place = rng.uniform(-1, 1, 2) * free.min(axis=0) + wander * scales[:, None]
    centres = np.array([picture[1], picture[0]]) / 2 + np.clip(place, -free, free)
    return Path(centres, scales, angles, bool(rng.random() < 0.5))


def affine(path: Path, frame: int, step: int, height: int, width: int) -> tuple[float, ...]:
    """Pillow's coefficients: where in the level (1 / `step` of the size) a view's pixel lies."""
    scale = path.scales[frame] / step
    cos, sin = np.cos(path.angles[frame]) * scale, np.sin(path.angles[frame]) * scale
    flip = -1 if path.mirrored else 1
    x, y = path.centres[frame] / step
    a, b, d, e = cos * flip, -sin, sin * flip, cos
    # Pillow adds half a pixel to both of the view's coordinates itself.
    return a, b, x - a * width / 2 - b * height / 2, d, e, y - d * width / 2 - e * height / 2


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
