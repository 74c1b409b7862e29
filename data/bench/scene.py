"""What a clip of the benchmark shows: shots of a camera on a backdrop with objects in front.

F frames, H x W pixels. A scene is rendered a stretch of frames at a time, so a minute needs no more
memory than a second. Its motion is known: `camera_motion` and `thing_motion` say where what a frame
shows was in the frame before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from data.drawing import MOTIONS, TEXTURES, bounce, motion
from data.footage.camera import Path, affine, drift, shoot
from data.footage.material import Material
from data.footage.objects import Thing, covered, draw
from data.kinds import Figure
from data.synthetic import draw_figure, muted_texture

Object = Thing | Figure
PACE = {"still": 0.0, "slow": 0.6, "fast": 1.8}  # of objects, over what training pairs show
PAN = {"still": 0.0, "slow": 0.004, "fast": 0.016}  # of the camera, picture heights a frame
CLOSE = {"photo": (0.45, 0.8), "clip": (0.6, 0.9)}  # share of the picture that the camera sees
CANVAS = 1.5  # size of a drawn backdrop, in pictures


@dataclass(frozen=True)
class Shot:
    """An unbroken stretch of `frames` frames. `pictures` is the backdrop, uint8 [P, h, w, 3] at
    1 / `step` of the size that `path` is in; frame n shows `pictures[shown[n]]`."""

    pictures: np.ndarray
    shown: np.ndarray
    step: int
    path: Path
    things: tuple[Object, ...] = ()
    edited: int | None = None  # which of the things the instruction is about

    @property
    def frames(self) -> int:
        return len(self.shown)

    def cut(self, first: int, last: int) -> Shot:
        """The shot's frames from `first` up to `last`."""
        path = replace(
            self.path,
            centres=self.path.centres[first:last],
            scales=self.path.scales[first:last],
            angles=self.path.angles[first:last],
        )
        things = tuple(
            replace(thing, centres=thing.centres[first:last], angles=thing.angles[first:last])
            for thing in self.things
        )
        return replace(self, shown=self.shown[first:last], path=path, things=things)


Change = Callable[[Shot], tuple[Object, ...]]


@dataclass(frozen=True)
class Scene:
    """Shots one after another."""

    shots: tuple[Shot, ...]
    height: int
    width: int

    @property
    def frames(self) -> int:
        return sum(shot.frames for shot in self.shots)

    @property
    def cuts(self) -> tuple[int, ...]:
        """First frames of all shots but the first."""
        ends = np.cumsum([shot.frames for shot in self.shots])
        return tuple(int(end) for end in ends[:-1])

    def stretch(self, first: int, last: int) -> list[Shot]:
        """The shots between two frames, cut to them."""
        parts, start = [], 0
        for shot in self.shots:
            a, b = max(first - start, 0), min(last - start, shot.frames)
            if a < b:
                parts.append(shot.cut(a, b))
            start += shot.frames
        return parts

    def render(self, first: int, last: int, change: Change | None = None) -> np.ndarray:
        """Frames as whole levels, float32 [n, H, W, 3]; `change` gives a shot's things anew."""
        views = []
        for shot in self.stretch(first, last):
            view = shoot(shot.pictures, shot.shown, shot.path, shot.step, self.height, self.width)
            video = view.astype(np.float32)
            for thing in shot.things if change is None else change(shot):
                paint(video, thing)
            views.append(np.clip(np.rint(video), 0, 255))
        return np.concatenate(views).astype(np.float32)

    def cover(self, first: int, last: int, named: bool) -> np.ndarray:
        """Share of each pixel under things (the edited one alone if `named`), [n, H, W, 1]."""
        covers = []
        for shot in self.stretch(first, last):
            things = [thing for thing in shot.things if isinstance(thing, Thing)]
            if named:
                assert shot.edited is not None
                things = [things[shot.edited]]
            covers.append(covered(things, (shot.frames, self.height, self.width)))
        return np.concatenate(covers)

    def camera_motion(self) -> np.ndarray:
        """[F - 1, 2, 3]: where a pixel of frame n + 1 that is no object was in frame n, as an
        affine map of (x, y, 1), pixel centres at halves; NaN across a cut."""
        maps = []
        for shot in self.shots:
            at = [
                np.array(affine(shot.path, n, 1, self.height, self.width)).reshape(2, 3)
                for n in range(shot.frames)
            ]
            maps += [_onto(before, after) for before, after in pairwise(at)]
            maps.append(np.full((2, 3), np.nan))
        return np.stack(maps[:-1])

    def thing_motion(self) -> np.ndarray | None:
        """The same for the edited thing; None if the instruction is about none."""
        maps = []
        for shot in self.shots:
            if shot.edited is None:
                return None
            thing = shot.things[shot.edited]
            at = [_own_axes(*pose) for pose in zip(thing.centres, thing.angles, strict=True)]
            maps += [_onto(before, after) for before, after in pairwise(at)]
            maps.append(np.full((2, 3), np.nan))
        return np.stack(maps[:-1])


def paint(video: np.ndarray, thing: Object) -> None:
    (draw if isinstance(thing, Thing) else draw_figure)(video, thing)  # type: ignore[arg-type]


def on_footage(material: Material, size: tuple[int, int], frames: int, speed: str,
               rng: np.random.Generator) -> Shot:  # fmt: skip
    """A camera on a photo or clip; a clip that is too short goes back and forth."""
    length, tall, wide = material.level(0).shape[:3]
    height, width = size
    scale = min(tall / height, wide / width) * rng.uniform(*CLOSE[material.kind])
    level = min(max(0, round(np.log2(scale))), len(material.levels) - 1)
    first = int(rng.integers(max(1, length - frames + 1)))
    shown = bounce(first + np.arange(frames), 0, length - 1) if length > 1 else np.zeros(frames)
    path = _path(frames, size, (tall, wide), scale, speed, rng)
    return Shot(material.level(level), shown.astype(int), 2**level, path)


def on_canvas(size: tuple[int, int], frames: int, speed: str, rng: np.random.Generator) -> Shot:
    """A camera on a drawn texture."""
    tall, wide = (round(CANVAS * length) for length in size)
    canvas = muted_texture(str(rng.choice(TEXTURES)), tall, wide, rng)
    pictures = np.rint(canvas).astype(np.uint8)[None]
    return Shot(
        pictures, np.zeros(frames, int), 1, _path(frames, size, (tall, wide), 1.0, speed, rng)
    )


def way(shot: Shot, size: tuple[int, int], fps: float, speed: str,
        rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Centres [F, 2] and angles [F] of an object: as fast as asked for, or still in the world."""
    height, width = size
    margin = 0.2 * unit_of(size)
    area = (margin, margin, width - margin, height - margin)
    how = str(rng.choice([name for name in MOTIONS if name != "still"]))
    spin = rng.uniform(-0.9, 0.9) * PACE[speed]  # radians a second
    tilt, pan, frames = rng.uniform(-0.3, 0.3), drift(shot.path), shot.frames
    if speed == "still":
        return motion("still", frames, fps, area, pan, rng), np.full(frames, tilt)
    centres = motion(how, frames, fps / PACE[speed], area, pan, rng)
    return centres, tilt + spin * np.arange(frames) / fps


def in_front(of: Object, fps: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The way of an object that passes over `of` in the middle of the shot."""
    frames, heading = len(of.centres), rng.uniform(0, 2 * np.pi)
    time = (np.arange(frames) - frames // 2) / fps
    way = np.array([np.cos(heading), np.sin(heading)]) * 2.2 * of.radius  # pixels a second
    return of.centres[frames // 2] + way * time[:, None], np.zeros(frames)


def unit_of(size: tuple[int, int]) -> float:
    """What objects' sizes are shares of."""
    return min(size[0], size[1] * 2 / 3)


def _path(frames: int, size: tuple[int, int], picture: tuple[int, int], scale: float, speed: str,
          rng: np.random.Generator) -> Path:  # fmt: skip
    time, phase, heading = np.arange(frames), *rng.uniform(0, 2 * np.pi, 2)
    angles = np.zeros(frames) if speed == "still" else 0.015 * np.sin(0.11 * time + phase)
    half = np.array([size[1], size[0]]) / 2 * scale  # (x, y)
    turned = half + half[::-1] * np.sin(0.015)
    free = (np.array([picture[1], picture[0]]) / 2 - 1 - turned).clip(0)
    pace = PAN[speed] * size[0] * scale
    place = rng.uniform(-1, 1, 2) * free
    along = place + np.array([np.cos(heading), np.sin(heading)]) * pace * time[:, None]
    away = np.stack([bounce(along[:, axis], -free[axis], free[axis]) for axis in (0, 1)], axis=1)
    centres = np.array([picture[1], picture[0]]) / 2 + away
    return Path(centres, np.full(frames, scale), angles, mirrored=False)


def _onto(inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """inner^-1 after outer, both affine [2, 3]: from outer's screen to inner's by way of what both
    look at."""
    square = [np.vstack([matrix, (0, 0, 1)]) for matrix in (inner, outer)]
    return np.linalg.solve(square[0], square[1])[:2]


def _own_axes(centre: np.ndarray, angle: float) -> np.ndarray:
    """From the screen to a thing's own axes."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.hstack([turn, -turn @ centre[:, None]])
