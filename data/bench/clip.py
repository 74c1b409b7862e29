"""`make_clip`: a clip of the benchmark from its case, with its right edit and known motion."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from data.bench.answers import truth_of
from data.bench.cases import CUT_AT, FPS, HALVES, LONG_CUT_EVERY, VERSION, Case
from data.bench.scene import Object, Scene, Shot, in_front, on_canvas, on_footage, unit_of, way
from data.drawing import SHAPES
from data.footage import regions
from data.footage.material import Footage, FootageError, Material
from data.footage.objects import PAINTS, PLACES, Thing
from data.kinds import ACCENTS, COLOURS, Figure
from data.synthetic import is_heldout
from infra.runtime.errors import UserError

OWN_FOOTAGE = Path(__file__).parent / "footage"
CHECKSUMS = Path(__file__).parent / "checksums.json"
SIZE = (128, 224)  # height and width of the published clips
STRETCH = 64  # frames made at a time: every clip but the long ones
NEEDS_COLOUR = ("black and white", "hue", "gray_background", "remove colourless")
COLOURED = 12.0  # mean colour difference from which footage counts as coloured
KEPT_THINGS = ("recolor", "replace", "reshape", "stripes", "outline")
THING_EDITS = (*KEPT_THINGS, "remove")


@dataclass(frozen=True)
class BenchClip:
    """One clip: videos uint8 [F, H, W, 3]. `camera` and `edited` say how what is seen, and what is
    edited, moves (`Scene.camera_motion`)."""

    case: Case
    instruction: str
    source: np.ndarray
    truth: np.ndarray
    camera: np.ndarray
    edited: np.ndarray
    cuts: tuple[int, ...]

    def checksum(self) -> str:
        """Of the instruction and all pixels."""
        digest = hashlib.sha256(self.instruction.encode())
        for video in (self.source, self.truth):
            digest.update(np.ascontiguousarray(video).data)
        return digest.hexdigest()[:16]


def make_clip(case: Case, footage: Footage | None, size: tuple[int, int] = SIZE) -> BenchClip:
    """The clip of `case`; `footage` (held out) is what natural ones are filmed from.

    Raises:
        FootageError: no footage, or none in colour, for a case that needs it.
    """
    seed = [VERSION, HALVES.index(case.half), case.number]
    rng = np.random.Generator(np.random.PCG64(seed))
    named = _names(case, rng)
    scene = Scene(tuple(_shots(case, footage, size, named, rng)), *size)
    named = _hue_names(case, scene, named, rng)
    instruction = re.sub(r"\ba (?=[aeiou])", "an ", case.words.format(**named))
    truth = truth_of(case, scene, named, seed)
    source = np.empty((scene.frames, *size, 3), np.uint8)
    target = np.empty_like(source)
    for first in range(0, scene.frames, STRETCH):
        last = first + STRETCH  # the last stretch ends with the clip
        source[first:last] = scene.render(first, last)
        target[first:last] = truth.frames(scene, first, last)
    camera = scene.camera_motion()
    return BenchClip(
        case, instruction, source, target, camera, _edited_motion(case, scene, camera), scene.cuts
    )


def _edited_motion(case: Case, scene: Scene, camera: np.ndarray) -> np.ndarray:
    """How the edited region's right content moves: with its thing, with the screen for what is
    added, or else with the camera."""
    if case.what == "add":
        return camera * 0 + np.eye(2, 3)  # NaN stays NaN across a cut
    if case.what in KEPT_THINGS:
        motion = scene.thing_motion()
        assert motion is not None
        return motion
    return camera


@cache
def published_checksums() -> dict[str, str]:
    """Clip name: checksum, of the clips of `SIZE` on the shipped footage."""
    try:
        stored = json.loads(CHECKSUMS.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"the benchmark's checksums cannot be read ({CHECKSUMS}: {error}); restore the file "
            "from the repository"
        ) from error
    if stored["version"] != VERSION:
        raise ValueError(f"{CHECKSUMS} is of version {stored['version']}, the cases of {VERSION}")
    return dict(stored["clips"])


def _names(case: Case, rng: np.random.Generator) -> dict[str, str]:
    """What the instruction calls the edited thing, and what it asks for."""
    paints = list(PAINTS if case.half == "natural" else COLOURS)
    while True:
        color, shape, other = (str(rng.choice(names)) for names in (paints, [*SHAPES], [*SHAPES]))
        to = str(rng.choice(_arguments(case, color, shape, paints)))
        place = str(rng.choice(list(PLACES)))
        edit = "recolor" if case.kind == "nothing" else case.kind
        if case.half == "natural" or is_heldout(edit, shape, color, to):
            return {"color": color, "shape": shape, "to": to, "other": other, "place": place}


def _arguments(case: Case, color: str, shape: str, paints: Sequence[str]) -> list[str]:
    what = case.what.split()[0]
    if what in ("replace", "reshape"):
        return [name for name in SHAPES if name != shape]
    if what == "remove":
        return [""]
    if what == "stripes":
        return list(ACCENTS)
    names = [*ACCENTS, *paints] if what == "outline" else list(paints)
    return [name for name in names if name != color]


def _hue_names(
    case: Case, scene: Scene, named: dict[str, str], rng: np.random.Generator
) -> dict[str, str]:
    """For edits by hue: a hue that the scene has most of (least of, for nothing to do)."""
    if case.what not in ("hue", "drain", "nothing hue"):
        return named
    views = [scene.render(n, n + 1) for n in (0, scene.frames // 2, scene.frames - 1)]
    video = np.concatenate(views)
    share = {hue: float(regions.hue_weight(video, hue).mean()) for hue in regions.HUES}
    color = (min if case.kind == "nothing" else max)(share, key=lambda hue: share[hue])
    to = str(rng.choice([hue for hue in regions.HUES if hue != color]))
    return named | {"color": color, "to": to}


def _shots(
    case: Case,
    footage: Footage | None,
    size: tuple[int, int],
    named: dict[str, str],
    rng: np.random.Generator,
) -> list[Shot]:
    pool = _pool(case, footage) if case.half == "natural" else []
    ends = [case.frames]
    if case.long:
        ends = [*range(LONG_CUT_EVERY, case.frames, LONG_CUT_EVERY), case.frames]
    elif case.cut:
        ends = [CUT_AT, case.frames]
    shots, start = [], 0
    for number, end in enumerate(ends):
        frames, start = end - start, end
        if pool:
            material = pool[(case.number + 3 * number) % len(pool)]
            shot = on_footage(material, size, frames, case.speed, rng)
        else:
            shot = on_canvas(size, frames, case.speed, rng)
        shots.append(_filled(shot, case, size, named, rng))
    return shots


def _pool(case: Case, footage: Footage | None) -> list[Material]:
    if footage is None or not footage.materials:
        raise FootageError(f"{case.name} is filmed from footage, and none is held out; give a "
                           "folder with photos or clips named in its heldout.txt")  # fmt: skip
    pool = sorted(footage.materials, key=lambda material: material.name)
    if case.kind not in NEEDS_COLOUR and case.what not in NEEDS_COLOUR:
        return pool
    coloured = [material for material in pool if _colour(material) >= COLOURED]
    if not coloured:
        raise FootageError(f"{case.name} needs footage in colour, and what is held out has none")
    return coloured


@cache
def _colour(material: Material) -> float:
    """Mean colour difference over a few of its pictures."""
    pictures = material.level(len(material.levels) - 1)
    pictures = pictures[:: max(1, len(pictures) // 4)].astype(np.float32)
    return float(np.hypot(*np.moveaxis(pictures @ regions.TO_YUV[1:].T, -1, 0)).mean())


def _filled(
    shot: Shot, case: Case, size: tuple[int, int], named: dict[str, str], rng: np.random.Generator
) -> Shot:
    """The shot with things in it: what the instruction names, a second one, one that hides it."""
    about = case.what.split()[0] in THING_EDITS or case.kind == "background"
    paints = [p for p in (PAINTS if case.half == "natural" else COLOURS) if p != named["color"]]
    shapes = [name for name in SHAPES if name != named["shape"]]
    color, shape, hiding, over = (
        str(name)
        for name in (*rng.choice(paints, 1), *rng.choice(shapes, 1), *rng.choice(paints, 1),
                     *rng.choice(shapes, 1))
    )  # fmt: skip
    second = rng.random() < (0.5 if about else 0.35) or case.kind == "nothing"
    things: list[Object] = []
    if second:
        things.append(_thing(case, shape, color, 0.18, way(shot, size, FPS, case.speed, rng), size))
    if about:
        radius = rng.uniform(0.17, 0.24)
        own = way(shot, size, FPS, case.speed, rng)
        things.append(_thing(case, named["shape"], named["color"], radius, own, size))
    if case.occluded:
        path = in_front(things[-1], FPS, rng)
        things.append(_thing(case, over, hiding, 0.17, path, size))
    edited = (1 if second else 0) if about else None
    return Shot(shot.pictures, shot.shown, shot.step, shot.path, tuple(things), edited)


def _thing(
    case: Case,
    shape: str,
    color: str,
    radius: float,
    on: tuple[np.ndarray, np.ndarray],
    size: tuple[int, int],
) -> Object:
    kind = Thing if case.half == "natural" else Figure
    return kind(shape, color, radius * unit_of(size), *on)
