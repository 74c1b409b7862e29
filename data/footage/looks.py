"""Edits of the whole picture as functions of its pixels: the truth that a pair's target shows.

Videos are float32 [F, H, W, 3] in 0 to 255 and come back so, to be rounded and clipped once by the
caller. `amount` is 1 for the plain edit, less for a gentle one, more for a strong one; `unit` is
H / 128, by which sizes in pixels grow with the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Video = np.ndarray
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def grey(video: Video) -> Video:
    """Brightness [F, H, W, 1]."""
    return (video @ LUMA)[..., None]


def _gains(video: Video, gains: tuple[float, float, float], amount: float) -> Video:
    return video * (1 + (np.array(gains, np.float32) - 1) * np.float32(amount))


def _height(video: Video) -> np.ndarray:
    """0 at the top row, 1 at the bottom row: [H, 1, 1]."""
    return np.linspace(0, 1, video.shape[1], dtype=np.float32)[:, None, None]


def night(video: Video, amount: float, unit: float) -> Video:
    dark = (video / 255) ** np.float32(1 + 0.3 * amount) * 255 * np.float32(0.6 ** (1.3 * amount))
    return _gains(dark, (0.72, 0.86, 1.22), min(amount, 1.2))


def sunset(video: Video, amount: float, unit: float) -> Video:
    glow = np.array([70, 26, -14], np.float32) * (1 - _height(video)) * np.float32(amount)
    return _gains(video, (1.12, 0.9, 0.7), amount) + glow


def warm(video: Video, amount: float, unit: float) -> Video:
    return _gains(video, (1.16, 1.02, 0.76), amount)


def cold(video: Video, amount: float, unit: float) -> Video:
    return _gains(video, (0.78, 0.98, 1.2), amount)


def faded(video: Video, amount: float, unit: float) -> Video:
    soft = video + (grey(video) - video) * np.float32(0.45 * amount)
    return (soft - 128) * np.float32(1 - 0.42 * amount) + np.float32(128 + 26 * amount)


def contrast(video: Video, amount: float, unit: float) -> Video:
    return (video - 128) * np.float32(1 + 0.7 * amount) + 128


def bright(video: Video, amount: float, unit: float) -> Video:
    return video * np.float32(1 + 0.4 * amount) + np.float32(10 * amount)


def dark(video: Video, amount: float, unit: float) -> Video:
    return video * np.float32(0.55**amount)


def colourless(video: Video, amount: float, unit: float) -> Video:
    """Black and white at 1, paler colours below."""
    return video + (grey(video) - video) * np.float32(min(amount, 1.0))


def vivid(video: Video, amount: float, unit: float) -> Video:
    light = grey(video)
    return light + (video - light) * np.float32(1 + 0.8 * amount)


def sepia(video: Video, amount: float, unit: float) -> Video:
    brown = grey(video) * np.array([1.08, 0.88, 0.64], np.float32)
    return video + (brown - video) * np.float32(min(amount, 1.0))


def negative(video: Video, amount: float, unit: float) -> Video:
    return 255 - video


def fog(video: Video, amount: float, unit: float) -> Video:
    """Thicker the farther away, and farther the higher in the picture."""
    depth = 1.1 - _height(video)
    through = np.exp(-1.5 * np.float32(amount) * depth)
    return video * through + np.array([206, 211, 216], np.float32) * (1 - through)


def sketch(video: Video, amount: float, unit: float) -> Video:
    """Dark lines on white paper."""
    light = grey(video)
    lines = np.abs(light - blur(light, 1.2 * unit))
    return np.broadcast_to(250 - np.clip(lines * 9 * amount - 12, 0, 235), video.shape)


def cartoon(video: Video, amount: float, unit: float) -> Video:
    """Flat colours and dark outlines."""
    smooth = blur(video, 1.0 * unit)
    step = np.float32(52 * amount)
    flat = np.round(smooth / step) * step
    flat = 0.75 * flat + 0.25 * smooth
    light = grey(smooth)
    lines = np.abs(light - blur(light, 2 * unit))
    return flat * (1 - np.clip(lines / 26 - 0.25, 0, 0.85))


def mosaic(video: Video, amount: float, unit: float) -> Video:
    """Squares of 8 pixels at amount 1 and height 128."""
    side = max(2, round(8 * amount * unit))
    frames, height, width, _ = video.shape
    padded = np.pad(video, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    rows, columns = padded.shape[1] // side, padded.shape[2] // side
    means = padded.reshape(frames, rows, side, columns, side, 3).mean(axis=(2, 4))
    return means.repeat(side, axis=1).repeat(side, axis=2)[:, :height, :width]


def soft(video: Video, amount: float, unit: float) -> Video:
    return blur(video, 2.2 * amount * unit)


def corners(video: Video, amount: float, unit: float) -> Video:
    """Dark corners."""
    _, height, width, _ = video.shape
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    return video * (1 - np.clip((x * x + y * y - 0.35) * 0.6 * amount, 0, 0.92))[..., None]


Look = Callable[[Video, float, float], Video]
LOOKS: dict[str, Look] = {
    "night": night,
    "sunset": sunset,
    "warm": warm,
    "cold": cold,
    "faded": faded,
    "contrast": contrast,
    "bright": bright,
    "dark": dark,
    "colourless": colourless,
    "vivid": vivid,
    "sepia": sepia,
    "negative": negative,
    "fog": fog,
    "sketch": sketch,
    "cartoon": cartoon,
    "mosaic": mosaic,
    "soft": soft,
    "corners": corners,
}


def light_from(video: Video, side: str, amount: float) -> Video:
    """Bright towards `side` (left, right, top, bottom), darker away from it."""
    axis = 2 if side in ("left", "right") else 1
    ramp = np.linspace(1, 0, video.shape[axis], dtype=np.float32)
    ramp = ramp if side in ("left", "top") else ramp[::-1]
    ramp = ramp[None, :, None] if axis == 2 else ramp[:, None, None]
    return video * (1 + np.float32(amount) * (1.1 * ramp - 0.45)) + 26 * np.float32(amount) * ramp


def blur(video: Video, spread: float) -> Video:
    """About a Gaussian of `spread` pixels: three means of boxes, edges repeated."""
    reach = max(1, round((np.sqrt(4 * spread**2 + 1) - 1) / 2))
    for axis in (1, 2):
        for _ in range(3):
            video = _box(video, reach, axis)
    return video


def _box(video: Video, reach: int, axis: int) -> Video:
    width = 2 * reach + 1
    pads = [(0, 0)] * 4
    pads[axis] = (reach, reach)
    padded = np.pad(video, pads, mode="edge")
    length = video.shape[axis]
    total = np.zeros_like(video)
    for shift in range(width):
        part = [slice(None)] * 4
        part[axis] = slice(shift, shift + length)
        total += padded[tuple(part)]
    return total / np.float32(width)
