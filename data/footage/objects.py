"""Drawn and cut-out objects that move over footage, with what each covers known exactly.

F frames, H x W pixels, P x P the patch of an object. An object is drawn into float32 videos
[F, H, W, 3] in 0 to 255 in place, over what is there, so the order of drawing is who hides whom.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.drawing import MOTIONS, SHAPES, coverage, motion, paste

PAINTS: dict[str, tuple[int, int, int]] = {
    "red": (214, 34, 38),
    "orange": (250, 138, 20),
    "yellow": (250, 224, 40),
    "green": (30, 150, 52),
    "blue": (32, 70, 214),
    "purple": (122, 36, 160),
    "pink": (250, 130, 196),
    "white": (245, 245, 245),
    "black": (16, 16, 16),
}
PATTERNED = "patterned"  # the paint of a cut-out: a piece of another photo
PLACES: dict[str, tuple[float, float]] = {  # (x, y) as shares of the picture
    "in the middle": (0.5, 0.5),
    "on the left": (0.22, 0.5),
    "on the right": (0.78, 0.5),
    "at the top": (0.5, 0.22),
    "at the bottom": (0.5, 0.78),
    "in the upper left corner": (0.18, 0.22),
    "in the upper right corner": (0.82, 0.22),
    "in the lower left corner": (0.18, 0.78),
    "in the lower right corner": (0.82, 0.78),
}


@dataclass(frozen=True)
class Thing:
    """One object and its way through the picture."""

    shape: str
    paint: str  # of PAINTS, or PATTERNED
    radius: float
    centres: np.ndarray  # [F, 2] (x, y)
    angles: np.ndarray  # [F] radians
    cutout: np.ndarray | None = None  # [side, side, 3] picture of a patterned one


def draw(video: np.ndarray, thing: Thing) -> None:
    """Paint `thing` over the video."""
    alpha, x, y, own_x, own_y = _outline(thing)
    if thing.cutout is None:
        # Light from the upper left, the same for every paint: what a recolouring must keep.
        light = 1 - 0.16 * np.clip((x + y) / (2 * thing.radius), -1, 1)
        fill = np.clip(np.array(PAINTS[thing.paint]) * light[..., None], 0, 255)
    else:
        side = thing.cutout.shape[0]
        rows, columns = (
            np.clip((own / (2.9 * thing.radius) + 0.5) * side, 0, side - 1).astype(int)
            for own in (own_y, own_x)
        )
        fill = thing.cutout[rows, columns]
    paste(video, thing.centres, fill.astype(np.float32), alpha)


def covered(things: list[Thing], shape: tuple[int, ...]) -> np.ndarray:
    """Share of each pixel that any of the things covers: [F, H, W, 1]."""
    cover = np.zeros((*shape[:3], 1), np.float32)
    for thing in things:
        alpha = _outline(thing)[0]
        paste(cover, thing.centres, np.ones((*alpha.shape, 1), np.float32), alpha)
    return cover


def _outline(thing: Thing) -> tuple[np.ndarray, ...]:
    """Cover of the thing's patch, and its pixels' places relative to the thing's centre: x and y
    on the screen, then in the thing's own axes; each [F, P, P]."""
    reach = int(np.ceil(1.45 * thing.radius)) + 2
    offset = np.arange(-reach, reach + 1, dtype=np.float64) + 0.5
    x = offset[None, None, :] - (thing.centres[:, 0] % 1)[:, None, None]
    y = offset[None, :, None] - (thing.centres[:, 1] % 1)[:, None, None]
    cos, sin = np.cos(thing.angles)[:, None, None], np.sin(thing.angles)[:, None, None]
    own_x, own_y = x * cos + y * sin, y * cos - x * sin
    alpha = coverage(SHAPES[thing.shape](own_x, own_y, thing.radius)).astype(np.float32)
    return alpha, x, y, own_x, own_y


def moving(
    shape: str,
    paint: str,
    video_shape: tuple[int, ...],
    fps: float,
    pan: np.ndarray,
    rng: np.random.Generator,
    cutout: np.ndarray | None = None,
) -> Thing:
    """A thing of random size on a random way; a still one moves as the footage does by `pan`."""
    frames, height, width = video_shape[:3]
    unit = min(height, width * 2 / 3)
    margin = 0.2 * unit
    area = (margin, margin, width - margin, height - margin)
    how = MOTIONS[int(rng.integers(len(MOTIONS)))]
    centres = motion(how, frames, fps, area, pan, rng)
    spin = rng.uniform(-0.9, 0.9) * (rng.random() < 0.5)  # radians a second
    angles = rng.uniform(-0.3, 0.3) + spin * np.arange(frames) / fps
    return Thing(shape, paint, unit * rng.uniform(0.13, 0.24), centres, angles, cutout)


def resting(shape: str, paint: str, place: str, video_shape: tuple[int, ...]) -> Thing:
    """A thing of one size that stays at a place of the screen: what "add a ..." draws."""
    frames, height, width = video_shape[:3]
    x, y = PLACES[place]
    centres = np.tile([x * width, y * height], (frames, 1))
    return Thing(shape, paint, 0.16 * min(height, width * 2 / 3), centres, np.zeros(frames))
