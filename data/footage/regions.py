"""Edits of a part of the picture that its own colours choose: "make the green things purple".

Hue is an angle in the plane of colour differences (U, V of BT.601); turning it there keeps
brightness. Videos are float32 [F, H, W, 3] in 0 to 255.
"""

from __future__ import annotations

import numpy as np

TO_YUV = np.array(
    [[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]], np.float32
)
FROM_YUV = np.linalg.inv(TO_YUV).astype(np.float32)
HUES: dict[str, tuple[int, int, int]] = {  # what the hue's name means
    "red": (205, 40, 40),
    "orange": (230, 130, 30),
    "yellow": (230, 215, 50),
    "green": (70, 160, 60),
    "blue": (50, 100, 205),
    "purple": (135, 60, 175),
    "pink": (235, 120, 180),
}
WIDTH = np.deg2rad(15), np.deg2rad(27)  # of a hue: wholly in it, wholly out of it
CHROMA = 14.0, 30.0  # colour differences under which nothing has a hue, over which all has one
ENOUGH = 0.02  # share of the picture that must have a hue for it to be there
NOTHING = 0.0005  # share under which it is not


def hue_angle(color: str) -> float:
    _, u, v = TO_YUV @ np.array(HUES[color], np.float32)
    return float(np.arctan2(v, u))


def hue_weight(video: np.ndarray, color: str) -> np.ndarray:
    """How much each pixel has that hue, soft-edged: [F, H, W, 1] in 0 to 1."""
    u, v = np.moveaxis(video @ TO_YUV[1:].T, -1, 0)
    away = np.abs((np.arctan2(v, u) - np.float32(hue_angle(color)) + np.pi) % (2 * np.pi) - np.pi)
    near = _smooth((WIDTH[1] - away) / (WIDTH[1] - WIDTH[0]))
    coloured = _smooth((np.hypot(u, v) - CHROMA[0]) / (CHROMA[1] - CHROMA[0]))
    return (near * coloured)[..., None]


def turn_hue(video: np.ndarray, weight: np.ndarray, color: str, to: str) -> np.ndarray:
    """Pixels of hue `color` in hue `to`, in proportion to `weight`."""
    return video + weight * (video @ _turn(hue_angle(to) - hue_angle(color)).T - video)


def drain(video: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Pixels without their colour, in proportion to `weight`."""
    light = (video @ TO_YUV[0])[..., None]
    return video + weight * (light - video)


def _turn(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], np.float32)
    return FROM_YUV @ turn @ TO_YUV


def _smooth(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)
