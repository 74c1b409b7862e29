"""`make_footage_pair`: an editing pair with exact truth from photos and clips.

Footage is filmed by a moving camera, objects are drawn over it, and the edit that the instruction
asks for is computed, so source and target differ by it and by nothing else. One seed gives one
pair. Kinds: `WEIGHTS`; how each is asked for: `data.footage.words`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data.drawing import SHAPES
from data.footage import looks, regions, words
from data.footage.camera import film
from data.footage.material import SPLITS, Footage, FootageError, Material
from data.footage.objects import PAINTS, PATTERNED, PLACES, Thing, covered, draw, moving, resting
from data.footage.weather import rain, snow
from data.sample import Pair

VERSION = 2  # raise it when a seed gives another pair than before
CLIP_SHARE = 0.4  # of pairs with real motion

WEIGHTS = {  # those that are learned last come most
    "look": 0.45, "hue": 0.12, "drain": 0.03, "recolor": 0.10, "replace": 0.04, "remove": 0.06,
    "add": 0.09, "blur_background": 0.02, "dark_background": 0.02, "gray_background": 0.02,
    "nothing": 0.05,
}  # fmt: skip
SECOND_LOOK = 0.15  # share of edits of a part that come with one of the whole picture
LOOK_WEIGHTS = {  # others 1
    "sketch": 2.0, "cartoon": 2.0, "mosaic": 2.0, "light": 2.5, "contrast": 2.0, "snow": 2.0,
    "vivid": 1.3, "rain": 0.7, "negative": 0.4, "corners": 0.6,
}  # fmt: skip
NEEDS_THING = ("recolor", "replace", "remove")
VISIBLE = 0.004  # share of the video that the edit of a thing must change
BACKGROUNDS = ("blur_background", "dark_background", "gray_background")


@dataclass
class Scene:
    """What was filmed and what is drawn over it; `video` is float32 [F, H, W, 3]."""

    video: np.ndarray
    things: list[Thing]
    rng: np.random.Generator

    @property
    def unit(self) -> float:
        return self.video.shape[1] / 128

    def render(self, things: list[Thing] | None = None) -> np.ndarray:
        """The scene with `things` (its own if None) as whole levels, float32."""
        video = self.video.copy()
        for thing in self.things if things is None else things:
            draw(video, thing)
        return rounded(video)


@dataclass
class Edit:
    """An instruction and the picture it asks for."""

    instruction: str
    target: np.ndarray  # float32 [F, H, W, 3]
    about: dict[str, Any] = field(default_factory=dict)


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
    kind = str(rng.choice(list(WEIGHTS), p=list(WEIGHTS.values())))
    material = _material(footage, frames, rng)
    video, pan = film(material, frames, height, width, rng)
    scene = Scene(video.astype(np.float32), [], rng)
    _fill(scene, kind, footage, fps, pan)
    source = scene.render()
    edit = _edit(scene, kind, source)
    if edit.about["kind"] not in ("look", "nothing") and rng.random() < SECOND_LOOK:
        second = _look(scene, rounded(edit.target))
        join = words.JOINS[int(rng.integers(len(words.JOINS)))]
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


def rounded(video: np.ndarray) -> np.ndarray:
    """Whole levels from 0 to 255, float32."""
    return np.clip(np.rint(video), 0, 255).astype(np.float32)


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


def _fill(scene: Scene, kind: str, footage: Footage, fps: float, pan: np.ndarray) -> None:
    """Put as many things in the scene as the edit wants: no two of one paint, or of one shape
    when they are patterned."""
    rng = scene.rng
    least = 1 if kind in NEEDS_THING + BACKGROUNDS else 0
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


def _edit(scene: Scene, kind: str, source: np.ndarray) -> Edit:
    if kind == "look":
        return _look(scene, source)
    if kind in ("hue", "drain"):
        return _by_hue(scene, kind, source)
    if kind == "nothing":
        return _nothing(scene, source)
    return _thing_edit(scene, kind, source)


def _look(scene: Scene, video: np.ndarray) -> Edit:
    rng = scene.rng
    names = list(words.LOOK_WORDS)
    weights = np.array([LOOK_WEIGHTS.get(name, 1.0) for name in names])
    look = str(rng.choice(names, p=weights / weights.sum()))
    strengths = words.LOOK_WORDS[look]
    amounts = list(strengths)
    odds = np.array([2.0 if amount == words.PLAIN else 1.0 for amount in amounts])
    amount = float(rng.choice(amounts, p=odds / odds.sum()))
    wording = strengths[amount][int(rng.integers(len(strengths[amount])))]
    about: dict[str, Any] = {"kind": "look", "look": look, "amount": amount}
    if look == "light":
        side = words.SIDES[int(rng.integers(len(words.SIDES)))]
        target = looks.light_from(video, side, amount)
        return Edit(wording.format(side=side), target, about | {"side": side})
    if look in ("snow", "rain"):
        fall: Callable[..., np.ndarray] = snow if look == "snow" else rain
        return Edit(wording, fall(video, amount, scene.unit, rng), about)
    return Edit(wording, looks.LOOKS[look](video, amount, scene.unit), about)


def _by_hue(scene: Scene, kind: str, source: np.ndarray) -> Edit:
    """An edit of what has a hue that is there, or of nothing if no hue is."""
    rng = scene.rng
    for color in rng.permutation(list(regions.HUES)):
        weight = regions.hue_weight(source, str(color))
        if weight.mean() >= regions.ENOUGH:
            to = str(rng.choice([hue for hue in regions.HUES if hue != color]))
            if kind == "hue":
                target = regions.turn_hue(source, weight, str(color), to)
            else:
                target, to = regions.drain(source, weight), ""
            return Edit(
                _wording(rng, kind).format(color=color, to=to),
                target,
                {"kind": kind, "color": str(color), "to": to},
            )
    return _nothing(scene, source)


def _thing_edit(scene: Scene, kind: str, source: np.ndarray) -> Edit:
    """An edit of a thing that can be seen: what is drawn last is never hidden."""
    rng = scene.rng
    if kind == "add":
        shape, paint = str(rng.choice(list(SHAPES))), str(rng.choice(list(PAINTS)))
        place = str(rng.choice(list(PLACES)))
        new = resting(shape, paint, place, scene.video.shape)
        text = _wording(rng, kind).format(color=paint, shape=shape, place=place)
        about = {"kind": kind, "color": paint, "shape": shape, "place": place}
        return Edit(text, scene.render([*scene.things, new]), about)
    *hidden, top = scene.things
    for index in (*rng.permutation(len(hidden)), len(hidden)):
        thing = scene.things[int(index)]
        edit = _edit_of(scene, kind, source, thing)
        if thing is top or (edit.target != source).any(axis=-1).mean() >= VISIBLE:
            return edit
    raise AssertionError("the last thing always returns")


def _edit_of(scene: Scene, kind: str, source: np.ndarray, thing: Thing) -> Edit:
    rng = scene.rng
    if kind in BACKGROUNDS:
        return _background(scene, kind, source, thing)
    named = {"color": thing.paint, "shape": thing.shape}
    if kind == "remove":
        others = [other for other in scene.things if other is not thing]
        text = _wording(rng, kind).format(**named)
        return Edit(text, scene.render(others), {"kind": kind} | named)
    if kind == "recolor":
        to = str(rng.choice([paint for paint in PAINTS if paint != thing.paint]))
        changed = replace(thing, paint=to, cutout=None)
    else:
        to = str(rng.choice([shape for shape in SHAPES if shape != thing.shape]))
        changed = replace(thing, shape=to)
    things = [changed if other is thing else other for other in scene.things]
    text = _wording(rng, kind).format(**named, to=to)
    return Edit(text, scene.render(things), {"kind": kind} | named | {"to": to})


def _background(scene: Scene, kind: str, source: np.ndarray, thing: Thing) -> Edit:
    """Change all that no thing covers, or all but `thing` if the wording names it."""
    text = _wording(scene.rng, kind)
    kept = covered([thing] if "{" in text else scene.things, source.shape)
    if kind == "blur_background":
        changed = looks.soft(source, 1.0, scene.unit)
    elif kind == "dark_background":
        changed = looks.dark(source, 1.6, scene.unit)
    else:
        changed = looks.colourless(source, 1.0, scene.unit)
    named = {"color": thing.paint, "shape": thing.shape}
    return Edit(text.format(**named), changed + (source - changed) * kept, {"kind": kind} | named)


def _nothing(scene: Scene, source: np.ndarray) -> Edit:
    """Ask for an edit of something that is not there."""
    rng = scene.rng
    absent = [
        hue for hue in rng.permutation(list(regions.HUES))
        if regions.hue_weight(source, str(hue)).mean() < regions.NOTHING
    ]  # fmt: skip
    if absent and rng.random() < 0.4:
        color = str(absent[0])
        to = str(rng.choice([hue for hue in regions.HUES if hue != color]))
        text = _wording(rng, "hue").format(color=color, to=to)
    else:
        there = {(thing.paint, thing.shape) for thing in scene.things}
        while True:
            color, shape = str(rng.choice(list(PAINTS))), str(rng.choice(list(SHAPES)))
            if (color, shape) not in there:
                break
        kind = NEEDS_THING[int(rng.integers(len(NEEDS_THING)))]
        to = str(rng.choice(list(SHAPES if kind == "replace" else PAINTS)))
        text = _wording(rng, kind).format(color=color, shape=shape, to=to)
    return Edit(text, source, {"kind": "nothing"})


def _wording(rng: np.random.Generator, kind: str) -> str:
    wordings = words.PART_WORDS[kind]
    return wordings[int(rng.integers(len(wordings)))]
