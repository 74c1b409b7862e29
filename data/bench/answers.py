"""The right answer to each instruction of the benchmark, a stretch of frames at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from data.bench.cases import Case
from data.bench.scene import Object, Scene, Shot
from data.footage import looks, regions
from data.footage.objects import Thing, resting
from data.footage.weather import rain, snow
from data.kinds import Figure

LookAt = Callable[[np.ndarray, int], np.ndarray]  # (float32 [n, H, W, 3], its first frame)
BACKGROUNDS: dict[str, tuple[looks.Look, float]] = {
    "blur_background": (looks.soft, 1.0),
    "dark_background": (looks.dark, 1.6),
    "gray_background": (looks.colourless, 1.0),
}


@dataclass(frozen=True)
class Truth:
    """What changes: the things of a shot, then the picture."""

    change: Callable[[Shot], tuple[Object, ...]] | None = None
    look: LookAt | None = None

    def frames(self, scene: Scene, first: int, last: int) -> np.ndarray:
        """The right edit of frames `first` up to `last` as whole levels, float32 [n, H, W, 3]."""
        video = scene.render(first, last, self.change)
        if self.look is not None:
            video = self.look(video, first)
        return np.clip(np.rint(video), 0, 255).astype(np.float32)


def truth_of(case: Case, scene: Scene, named: dict[str, str], seed: list[int]) -> Truth:
    """The edit that `case` asks for, its words filled with `named`."""
    if case.kind == "nothing":
        return Truth()
    if case.what in BACKGROUNDS:
        return Truth(look=_background(scene, case))
    if case.what == "hue" or case.what == "drain":
        return Truth(look=_by_hue(case.what, named["color"], named["to"]))
    what, *then = case.what.split()
    if what in ("recolor", "replace", "reshape", "remove", "add", "stripes", "outline"):
        second = _look(then[0], 1.0, scene, seed) if then else None
        return Truth(lambda shot: _changed(shot, what, named, scene), second)
    if what == "light":
        return Truth(look=lambda video, _: looks.light_from(video, then[0], case.amount))
    return Truth(look=_look(what, case.amount, scene, seed))


def _look(name: str, amount: float, scene: Scene, seed: list[int]) -> LookAt:
    unit = scene.height / 128
    if name in ("snow", "rain"):
        fall = snow if name == "snow" else rain

        def falling(video: np.ndarray, first: int) -> np.ndarray:
            assert first == 0, "what falls has a beginning, so its clip is made in one stretch"
            return fall(video, amount, unit, np.random.Generator(np.random.PCG64(seed)))

        return falling
    return lambda video, _: looks.LOOKS[name](video, amount, unit)


def _by_hue(what: str, color: str, to: str) -> LookAt:
    def look(video: np.ndarray, _: int) -> np.ndarray:
        weight = regions.hue_weight(video, color)
        if what == "drain":
            return regions.drain(video, weight)
        return regions.turn_hue(video, weight, color, to)

    return look


def _background(scene: Scene, case: Case) -> LookAt:
    change, amount = BACKGROUNDS[case.what]

    def look(video: np.ndarray, first: int) -> np.ndarray:
        kept = scene.cover(first, first + len(video), named="{" in case.words)
        changed = change(video, amount, scene.height / 128)
        return changed + (video - changed) * kept

    return look


def _changed(shot: Shot, what: str, named: dict[str, str], scene: Scene) -> tuple[Object, ...]:
    if what == "add":
        size = (shot.frames, scene.height, scene.width)
        return (*shot.things, resting(named["shape"], named["color"], named["place"], size))
    assert shot.edited is not None
    changed = None if what == "remove" else _renewed(shot.things[shot.edited], what, named["to"])
    things = [changed if n == shot.edited else thing for n, thing in enumerate(shot.things)]
    return tuple(thing for thing in things if thing is not None)


def _renewed(thing: Object, what: str, to: str) -> Object:
    if what in ("replace", "reshape"):
        return replace(thing, shape=to)
    if isinstance(thing, Thing):
        return replace(thing, paint=to)
    assert isinstance(thing, Figure)
    if what == "recolor":
        return replace(thing, color=to)
    return replace(thing, stripes=to) if what == "stripes" else replace(thing, outline=to)
