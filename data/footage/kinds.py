"""What edits of footage there are: a line each in `KINDS`.

Another entry, another order or another weight changes which pair a seed gives: raise `VERSION` in
`data.footage.pair` with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data.drawing import SHAPES
from data.footage import looks, regions, wordings
from data.footage.objects import PAINTS, PLACES, Thing, covered, draw, resting
from data.footage.weather import rain, snow

LOOK_WEIGHTS = {  # others 1
    "sketch": 2.0, "cartoon": 2.0, "mosaic": 2.0, "light": 2.5, "contrast": 2.0, "snow": 2.0,
    "vivid": 1.3, "rain": 0.7, "negative": 0.4, "corners": 0.6,
}  # fmt: skip
NEEDS_THING = ("recolor", "replace", "remove")  # what may be asked of a thing that is not there
VISIBLE = 0.004  # share of the video that the edit of a thing must change


@dataclass
class Filmed:
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


# Of a scene, the kind's name and the source as it is rendered, float32 [F, H, W, 3].
EditScene = Callable[[Filmed, str, np.ndarray], Edit]
EditThing = Callable[[Filmed, str, np.ndarray, Thing], Edit]


@dataclass(frozen=True)
class Kind:
    weight: float  # share of the pairs; all sum to 1
    edit: EditScene
    of_a_thing: bool = False  # the scene needs one


def rounded(video: np.ndarray) -> np.ndarray:
    """Whole levels from 0 to 255, float32."""
    return np.clip(np.rint(video), 0, 255).astype(np.float32)


def look(scene: Filmed, kind: str, video: np.ndarray) -> Edit:
    """One of the whole picture."""
    rng = scene.rng
    names = list(wordings.LOOK_WORDS)
    weights = np.array([LOOK_WEIGHTS.get(name, 1.0) for name in names])
    name = str(rng.choice(names, p=weights / weights.sum()))
    strengths = wordings.LOOK_WORDS[name]
    amounts = list(strengths)
    odds = np.array([2.0 if amount == wordings.PLAIN else 1.0 for amount in amounts])
    amount = float(rng.choice(amounts, p=odds / odds.sum()))
    wording = strengths[amount][int(rng.integers(len(strengths[amount])))]
    about: dict[str, Any] = {"kind": kind, "look": name, "amount": amount}
    if name == "light":
        side = wordings.SIDES[int(rng.integers(len(wordings.SIDES)))]
        target = looks.light_from(video, side, amount)
        return Edit(wording.format(side=side), target, about | {"side": side})
    if name in ("snow", "rain"):
        fall: Callable[..., np.ndarray] = snow if name == "snow" else rain
        return Edit(wording, fall(video, amount, scene.unit, rng), about)
    return Edit(wording, looks.LOOKS[name](video, amount, scene.unit), about)


def _by_hue(scene: Filmed, kind: str, source: np.ndarray) -> Edit:
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
    return _nothing(scene, "nothing", source)


def _add(scene: Filmed, kind: str, source: np.ndarray) -> Edit:
    rng = scene.rng
    shape, paint = str(rng.choice(list(SHAPES))), str(rng.choice(list(PAINTS)))
    place = str(rng.choice(list(PLACES)))
    new = resting(shape, paint, place, scene.video.shape)
    text = _wording(rng, kind).format(color=paint, shape=shape, place=place)
    about = {"kind": kind, "color": paint, "shape": shape, "place": place}
    return Edit(text, scene.render([*scene.things, new]), about)


def of_a_thing(edit: EditThing) -> EditScene:
    """`edit` of a thing that can be seen: what is drawn last is never hidden."""

    def edited(scene: Filmed, kind: str, source: np.ndarray) -> Edit:
        *hidden, top = scene.things
        for index in (*scene.rng.permutation(len(hidden)), len(hidden)):
            thing = scene.things[int(index)]
            found = edit(scene, kind, source, thing)
            if thing is top or (found.target != source).any(axis=-1).mean() >= VISIBLE:
                return found
        raise AssertionError("the last thing always returns")

    return edited


def _remove(scene: Filmed, kind: str, source: np.ndarray, thing: Thing) -> Edit:
    named = {"color": thing.paint, "shape": thing.shape}
    others = [other for other in scene.things if other is not thing]
    text = _wording(scene.rng, kind).format(**named)
    return Edit(text, scene.render(others), {"kind": kind} | named)


def _recolor(scene: Filmed, kind: str, source: np.ndarray, thing: Thing) -> Edit:
    to = str(scene.rng.choice([paint for paint in PAINTS if paint != thing.paint]))
    return _changed(scene, kind, thing, replace(thing, paint=to, cutout=None), to)


def _replace(scene: Filmed, kind: str, source: np.ndarray, thing: Thing) -> Edit:
    to = str(scene.rng.choice([shape for shape in SHAPES if shape != thing.shape]))
    return _changed(scene, kind, thing, replace(thing, shape=to), to)


def _changed(scene: Filmed, kind: str, thing: Thing, changed: Thing, to: str) -> Edit:
    named = {"color": thing.paint, "shape": thing.shape}
    things = [changed if other is thing else other for other in scene.things]
    text = _wording(scene.rng, kind).format(**named, to=to)
    return Edit(text, scene.render(things), {"kind": kind} | named | {"to": to})


def _background(change: Callable[[np.ndarray, float], np.ndarray]) -> EditThing:
    """`change` of all that no thing covers, or of all but one if the wording names it."""

    def edited(scene: Filmed, kind: str, source: np.ndarray, thing: Thing) -> Edit:
        text = _wording(scene.rng, kind)
        kept = covered([thing] if "{" in text else scene.things, source.shape)
        changed = change(source, scene.unit)
        named = {"color": thing.paint, "shape": thing.shape}
        target = changed + (source - changed) * kept
        return Edit(text.format(**named), target, {"kind": kind} | named)

    return edited


def _nothing(scene: Filmed, kind: str, source: np.ndarray) -> Edit:
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
        of = NEEDS_THING[int(rng.integers(len(NEEDS_THING)))]
        to = str(rng.choice(list(SHAPES if of == "replace" else PAINTS)))
        text = _wording(rng, of).format(color=color, shape=shape, to=to)
    return Edit(text, source, {"kind": kind})


def _wording(rng: np.random.Generator, kind: str) -> str:
    said = wordings.PART_WORDS[kind]
    return said[int(rng.integers(len(said)))]


KINDS = {  # those that are learned last come most
    "look": Kind(0.45, look),
    "hue": Kind(0.12, _by_hue),
    "drain": Kind(0.03, _by_hue),
    "recolor": Kind(0.10, of_a_thing(_recolor), of_a_thing=True),
    "replace": Kind(0.04, of_a_thing(_replace), of_a_thing=True),
    "remove": Kind(0.06, of_a_thing(_remove), of_a_thing=True),
    "add": Kind(0.09, _add),
    "blur_background": Kind(
        0.02, of_a_thing(_background(lambda v, unit: looks.soft(v, 1.0, unit))), of_a_thing=True
    ),
    "dark_background": Kind(
        0.02, of_a_thing(_background(lambda v, unit: looks.dark(v, 1.6, unit))), of_a_thing=True
    ),
    "gray_background": Kind(
        0.02,
        of_a_thing(_background(lambda v, unit: looks.colourless(v, 1.0, unit))),
        of_a_thing=True,
    ),
    "nothing": Kind(0.05, _nothing),
}
