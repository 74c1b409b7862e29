"""data/bench/answers.py: the right edit of every case, of a scene in which all is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.bench.answers import truth_of
from data.bench.cases import CASES, Case
from data.bench.scene import Object, Scene, Shot
from data.footage import looks, regions, weather, wordings
from data.footage.camera import Path
from data.footage.objects import Thing, covered, resting
from data.kinds import Figure

HEIGHT, WIDTH, FRAMES = 16, 24, 2
UNIT = HEIGHT / 128
SEED = [1, 2, 3]
ASKED = {(case.half, case.what, "{" in case.words, case.amount): case for case in CASES}


def a_scene(half: str) -> Scene:
    """A blue circle under a red square, which is what is edited, over noise."""
    kind = Thing if half == "natural" else Figure
    still, middle = np.zeros(FRAMES), np.tile([12.0, 8.0], (FRAMES, 1))
    things: tuple[Object, ...] = tuple(
        kind(shape, color, 4, np.tile(centre, (FRAMES, 1)), still)
        for shape, color, centre in (("circle", "blue", (8, 8)), ("square", "red", (15, 8)))
    )
    pictures = np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH, 3), np.uint8)
    path = Path(middle, np.ones(FRAMES), still, mirrored=False)
    shot = Shot(pictures, np.zeros(FRAMES, int), 1, path, things, edited=1)
    return Scene((shot,), HEIGHT, WIDTH)


def named_by(case: Case) -> dict[str, str]:
    to = {"replace": "star", "reshape": "star", "stripes": "white", "outline": "white"}
    if case.what in ("hue", "drain"):
        return {"color": "blue", "to": "green"}
    return {"color": "red", "shape": "square", "place": "on the left",
            "to": to.get(case.what, "green")}  # fmt: skip


def of_the_things(case: Case, scene: Scene, to: str) -> tuple[Object, ...]:
    under, top = scene.shots[0].things
    what = case.what.split()[0]
    if what == "add":
        return under, top, resting("square", "red", "on the left", (FRAMES, HEIGHT, WIDTH))
    if what == "remove":
        return (under,)
    if what in ("replace", "reshape"):
        return under, replace(top, shape=to)
    if isinstance(top, Thing):
        return under, replace(top, paint=to)
    return under, replace(top, **{"color" if what == "recolor" else what: to})


def right_edit(case: Case, scene: Scene, named: dict[str, str]) -> np.ndarray:
    video = scene.render(0, FRAMES)
    what, *more = case.what.split()
    if what == "nothing":
        return video
    if what in ("hue", "drain"):
        weight = regions.hue_weight(video, "blue")
        turned = regions.turn_hue(video, weight, "blue", "green")
        return turned if what == "hue" else regions.drain(video, weight)
    if what == "light":
        return looks.light_from(video, more[0], case.amount)
    if what in ("snow", "rain"):
        rng = np.random.Generator(np.random.PCG64(SEED))
        return (weather.snow if what == "snow" else weather.rain)(video, case.amount, UNIT, rng)
    if what in looks.LOOKS:
        return looks.LOOKS[what](video, case.amount, UNIT)
    if what.endswith("_background"):
        changed = {
            "blur_background": looks.soft(video, 1.0, UNIT),
            "dark_background": looks.dark(video, 1.6, UNIT),
            "gray_background": looks.colourless(video, 1.0, UNIT),
        }[what]
        things = [thing for thing in scene.shots[0].things if isinstance(thing, Thing)]
        kept = covered(things[1:] if "{" in case.words else things, video.shape)
        return changed + (video - changed) * kept
    edited = scene.render(0, FRAMES, lambda shot: of_the_things(case, scene, named["to"]))
    return looks.LOOKS[more[0]](edited, 1.0, UNIT) if more else edited


@pytest.mark.parametrize("case", ASKED.values(), ids=lambda case: case.name)
def test_the_right_edit_is_the_one_that_is_asked_for(case: Case) -> None:
    scene, named = a_scene(case.half), named_by(case)
    found = truth_of(case, scene, named, SEED).frames(scene, 0, FRAMES)
    wanted = np.clip(np.rint(right_edit(case, scene, named)), 0, 255)
    np.testing.assert_array_equal(found, wanted)
    assert (found == scene.render(0, FRAMES)).all() == (case.kind == "nothing")


def test_a_look_is_as_strong_as_its_words_say() -> None:
    for case in CASES:
        what, *side = case.what.split()
        if what in wordings.LOOK_WORDS and case.kind != "nothing":
            said = wordings.LOOK_WORDS[what][case.amount]
            assert case.words in [words.format(side="".join(side)) for words in said], case.name
