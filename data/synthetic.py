"""Synthetic editing pairs with exact ground truth.

One or two coloured objects move over a muted textured background; the instruction names one of
them and an edit. Source and target are drawn from the same scene, so they differ in the edited
pixels and nowhere else. One seed gives one pair, on every machine.

The held-out split holds the (edit, shape, colour, argument) combinations whose hash says so; the
train split never shows them, though it shows each of their words in others.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from data.drawing import MOTIONS, SHAPES, TEXTURES, coverage, motion, paste, texture
from data.kinds import COLOURS, EDITS, PAINTS, Figure
from data.sample import Pair
from infra.runtime.errors import UserError

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 8  # one combination in eight
VERSION = 1  # raise it when a seed gives another pair than before


def is_heldout(edit: str, shape: str, color: str, to: str) -> bool:
    """Whether this combination belongs to the held-out split."""
    digest = hashlib.sha256(f"{edit}|{shape}|{color}|{to}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0


def make_pair(
    seed: int,
    *,
    height: int = 128,
    width: int = 192,
    frames: int = 33,
    fps: float = 16,
    split: str = "train",
) -> Pair:
    """The pair of one seed: source and target uint8 `[F, H, W, 3]`, mask bool `[F, H, W]`.

    `origin` holds seed, split, edit, shape, color, to, motion, background and object count.

    Raises:
        UserError: an unknown split or a size below 16.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {SPLITS}, got {split!r}")
    if min(height, width) < 16 or frames < 1 or fps <= 0:
        raise UserError(
            "a synthetic pair needs at least 16x16 pixels, one frame and fps above 0, "
            f"got {width}x{height}, {frames} frames, {fps} fps"
        )
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split)]))
    edit, shape, color, to = _choose(rng, split)
    unit = min(height, width * 2 / 3)

    pan = _camera(frames, fps, unit, rng)
    kind = str(rng.choice(TEXTURES))
    background = _background(kind, height, width, pan, rng)

    how = str(rng.choice(MOTIONS))
    two = rng.random() < 0.55
    mirrored = bool(rng.random() < 0.5)
    room = _area(height, width, unit, (0.5 if two else 1.0), mirrored)
    radius, angles = unit * rng.uniform(0.17, 0.23), _angles(frames, fps, rng)
    centres = motion(how, frames, fps, room, pan, rng)
    chosen = Figure(shape, color, radius, centres, angles)
    others = []
    if two:
        other_room = _area(height, width, unit, 0.5, not mirrored)
        other_color = str(rng.choice([c for c in COLOURS if c != color]))
        others.append(
            Figure(
                str(rng.choice(list(SHAPES))),
                other_color,
                unit * rng.uniform(0.15, 0.21),
                motion(str(rng.choice(MOTIONS)), frames, fps, other_room, pan, rng),
                _angles(frames, fps, rng),
            )
        )
    phrases = EDITS[edit].phrases
    phrase = phrases[int(rng.integers(len(phrases)))]

    scene = background
    for thing in others:
        draw_figure(scene, thing)
    source, target = scene.copy(), scene
    draw_figure(source, chosen)
    edited = EDITS[edit].edit(chosen, to)
    if edited is not None:
        draw_figure(target, edited)
    source8, target8 = _to_uint8(source), _to_uint8(target)
    origin: dict[str, Any] = {
        "generator": "synthetic",
        "version": VERSION,
        "seed": seed,
        "split": split,
        "edit": edit,
        "shape": shape,
        "color": color,
        "to": to,
        "motion": how,
        "background": kind,
        "objects": 1 + len(others),
    }
    return Pair(
        source=source8,
        target=target8,
        mask=(source8 != target8).any(axis=-1),
        instruction=phrase.format(color=color, shape=shape, to=to),
        fps=float(fps),
        origin=origin,
    )


def _choose(rng: np.random.Generator, split: str) -> tuple[str, str, str, str]:
    while True:
        edit = str(rng.choice(list(EDITS), p=[kind.weight for kind in EDITS.values()]))
        shape, color = str(rng.choice(list(SHAPES))), str(rng.choice(list(COLOURS)))
        to = str(rng.choice(EDITS[edit].arguments(shape, color)))
        if is_heldout(edit, shape, color, to) == (split == "heldout"):
            return edit, shape, color, to


def _camera(frames: int, fps: float, unit: float, rng: np.random.Generator) -> np.ndarray:
    """Offsets `[F, 2]` of a slow pan to and fro; half of the cameras stand still."""
    reach = rng.uniform(0.05, 0.14) * unit * (rng.random() < 0.5)
    heading, phase = rng.uniform(0, 2 * np.pi, 2)
    sway = np.sin(phase + 2 * np.pi * rng.uniform(0.15, 0.35) * np.arange(frames) / fps)
    return reach * sway[:, None] * np.array([np.cos(heading), np.sin(heading)])


def _background(
    kind: str, height: int, width: int, pan: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Float32 `[F, H, W, 3]` in [0, 255]: a muted texture seen through a moving window."""
    border = int(np.abs(pan).max()) + 2
    canvas = muted_texture(kind, height + 2 * border, width + 2 * border, rng)
    video = np.empty((len(pan), height, width, 3), np.float32)
    for frame, (x, y) in zip(video, border - pan, strict=True):
        i, j = int(y), int(x)
        v, u = np.float32(y - i), np.float32(x - j)
        rows = canvas[i : i + height] * (1 - v) + canvas[i + 1 : i + 1 + height] * v
        frame[:] = rows[:, j : j + width] * (1 - u) + rows[:, j + 1 : j + 1 + width] * u
    return video


def muted_texture(kind: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A background that no object's colour is confused with: float32 `[H, W, 3]`, 20 to 235."""
    weights = texture(kind, height, width, rng)[..., None]
    gray = rng.uniform(70, 190)
    tint, other = rng.uniform(-22, 22, 3), rng.uniform(-22, 22, 3)
    contrast = rng.uniform(28, 60) * rng.choice([-1.0, 1.0])
    canvas = (gray + tint) * (1 - weights) + (gray + contrast + other) * weights
    return np.clip(canvas, 20, 235).astype(np.float32)


def _area(
    height: int, width: int, unit: float, share: float, right: bool
) -> tuple[float, float, float, float]:
    """Where an object's centre may go: all of the picture, or its own half of it."""
    margin = 0.22 * unit
    left, wide = (width * (1 - share) if right else 0.0), width * share
    return left + margin, margin, left + wide - margin, height - margin


def _angles(frames: int, fps: float, rng: np.random.Generator) -> np.ndarray:
    spin = rng.uniform(-0.9, 0.9) * (rng.random() < 0.6)  # radians a second
    return rng.uniform(-0.3, 0.3) + spin * np.arange(frames) / fps


def draw_figure(video: np.ndarray, thing: Figure) -> None:
    """Paint `thing` over the float32 video `[F, H, W, 3]`."""
    r = thing.radius
    band = 0.2 * r  # thickness of an outline
    reach = int(np.ceil(1.45 * r + band)) + 2
    offset = np.arange(-reach, reach + 1, dtype=np.float64)
    # Pixel centres relative to the object's centre, turned into the object's own axes: [F, P, P]
    x = offset[None, None, :] + 0.5 - (thing.centres[:, 0] % 1)[:, None, None]
    y = offset[None, :, None] + 0.5 - (thing.centres[:, 1] % 1)[:, None, None]
    cos, sin = np.cos(thing.angles)[:, None, None], np.sin(thing.angles)[:, None, None]
    own_x, own_y = x * cos + y * sin, y * cos - x * sin
    distance = SHAPES[thing.shape](own_x, own_y, r)

    # Light from the upper left, the same for every fill: what a recolouring must keep.
    light = 1 - 0.16 * np.clip((x + y) / (2 * r), -1, 1)
    fill = np.array(PAINTS[thing.color]) * light[..., None]
    if thing.stripes:
        pitch = 0.62 * r
        wave = np.abs((own_x / pitch) % 1 - 0.5) * pitch - 0.25 * pitch
        share = coverage(wave)[..., None]
        fill = fill * (1 - share) + np.array(PAINTS[thing.stripes]) * light[..., None] * share
    if thing.outline:
        paint = np.broadcast_to(np.array(PAINTS[thing.outline], np.float64), fill.shape)
        paste(video, thing.centres, paint, coverage(distance - band))
    paste(video, thing.centres, np.clip(fill, 0, 255), coverage(distance))


def _to_uint8(video: np.ndarray) -> np.ndarray:
    return np.rint(video).astype(np.uint8)  # shares of colours: none is outside 0 to 255
