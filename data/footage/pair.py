"""`make_footage_pair`: an editing pair with exact truth from photos and clips.

Footage is filmed by a moving camera, objects are drawn over it, and the edit that the instruction
asks for is computed, so source and target differ by it and by nothing else. One seed gives one
pair. Kinds of edit: `data.footage.kinds`; how each is asked for: `data.footage.wordings`.
"""

from __future__ import annotations

import re

import numpy as np

from data.drawing import SHAPES
from data.footage import wordings
from data.footage.camera import film
from data.footage.kinds import KINDS, Edit, Filmed, look, rounded
from data.footage.material import SPLITS, Footage, FootageError, Material
from data.footage.objects import PAINTS, PATTERNED, moving
from data.sample import Pair

VERSION = 2  # raise it when a seed gives another pair than before
CLIP_SHARE = 0.4  # of pairs with real motion
SECOND_LOOK = 0.15  # share of edits of a part that come with one of the whole picture


def make_footage_pair(
    seed: int,
    footage: Footage,
    *,
    height: int = 128,
    width: int = 224,
    frames: int = 33,
    fps: float = 16,
) -> Pair:
    """The pair of one seed: source and target uint8 `[F, H, W, 3]`, mask bool `[F, H, W]`, True
    where they differ. `origin` holds the seed, the file, the kind and its arguments.

    Raises:
        FootageError: the split holds no photo and no clip of that many frames.
    """
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(footage.split)]))
    kind = str(rng.choice(list(KINDS), p=[kind.weight for kind in KINDS.values()]))
    material = _material(footage, frames, rng)
    video, pan = film(material, frames, height, width, rng)
    scene = Filmed(video.astype(np.float32), [], rng)
    _fill(scene, kind, footage, fps, pan)
    source = scene.render()
    edit = KINDS[kind].edit(scene, kind, source)
    if edit.about["kind"] not in ("look", "nothing") and rng.random() < SECOND_LOOK:
        second = look(scene, "look", rounded(edit.target))
        join = wordings.JOINS[int(rng.integers(len(wordings.JOINS)))]
        about = edit.about | {"second": second.about}
        edit = Edit(join.format(a=edit.instruction, b=second.instruction), second.target, about)
    source8, target8 = source.astype(np.uint8), rounded(edit.target).astype(np.uint8)
    origin = {
        "generator": "footage", "version": VERSION, "seed": seed, "split": footage.split,
        "material": material.name, "things": [[t.paint, t.shape] for t in scene.things],
        **edit.about,
    }  # fmt: skip
    return Pair(
        source=source8,
        target=target8,
        mask=(source8 != target8).any(axis=-1),
        instruction=re.sub(r"\ba (?=[aeiou])", "an ", edit.instruction),
        fps=float(fps),
        origin=origin,
    )


def _material(footage: Footage, frames: int, rng: np.random.Generator) -> Material:
    clips = [clip for clip in footage.clips if clip.level(0).shape[0] >= frames]
    if not clips and not footage.photos:
        raise FootageError(
            f"the {footage.split} split holds no photo and no clip of {frames} frames; add "
            "footage, or name files to hold out in heldout.txt"
        )
    real = bool(clips) and (not footage.photos or rng.random() < CLIP_SHARE)
    pool = clips if real else footage.photos
    return pool[int(rng.integers(len(pool)))]


def _fill(scene: Filmed, kind: str, footage: Footage, fps: float, pan: np.ndarray) -> None:
    """Put as many things in the scene as the edit wants: no two of one paint, or of one shape
    when they are patterned."""
    rng = scene.rng
    least = 1 if KINDS[kind].of_a_thing else 0
    count = max(least, int(rng.choice(4, p=[0.42, 0.3, 0.2, 0.08])))
    shapes = list(rng.permutation(list(SHAPES)))
    paints = list(rng.permutation(list(PAINTS)))
    for n in range(count):
        cutout = None
        if rng.random() < 0.3 and footage.photos:
            cutout = _cutout(footage, scene.video.shape[1], rng)
        paint = PATTERNED if cutout is not None else str(paints[n])
        scene.things.append(moving(str(shapes[n]), paint, scene.video.shape, fps, pan, rng, cutout))


def _cutout(footage: Footage, side: int, rng: np.random.Generator) -> np.ndarray:
    """A square of a photo, about as fine as the picture: [side, side, 3]."""
    photo = footage.photos[int(rng.integers(len(footage.photos)))]
    picture = photo.level(min(2, len(photo.levels) - 1))[0]
    side = min(side, *picture.shape[:2])
    top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
    return np.array(picture[top : top + side, left : left + side])
