"""data/footage/kinds.py: which of the things an edit is of, and what it makes of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.bench.answers import BACKGROUNDS
from data.drawing import SHAPES
from data.footage import kinds, regions
from data.footage.kinds import KINDS, VISIBLE, Edit, Filmed, of_a_thing
from data.footage.objects import PAINTS, Thing, covered, resting
from tests.data.footage.conftest import scene


@pytest.mark.parametrize(
    ("seen", "chosen"),
    [
        ((0, 0, 0), {2}),  # the last one drawn, which nothing hides
        ((0, 0, 50), {2}),
        ((50, 0, 0), {0}),
        ((0, 50, 50), {1}),
        ((50, 50, 50), {0, 1}),  # any of those that may be hidden goes before it
        ((4, 3, 0), {0}),  # of a thousand pixels four are enough
    ],
)
def test_an_edit_is_of_a_thing_that_can_be_seen(
    seen: tuple[int, int, int], chosen: set[int]
) -> None:
    source = np.zeros((1, 25, 40, 3), np.float32)

    def edit(scene: Any, kind: str, before: np.ndarray, thing: int) -> Edit:
        target = before.copy()
        target.reshape(-1, 3)[: seen[thing], 1] = 1
        return Edit(f"{kind} {thing}", target)

    assert VISIBLE == 0.004
    found = set()
    for seed in range(12):
        scene: Any = SimpleNamespace(things=[0, 1, 2], rng=np.random.default_rng(seed))
        found.add(of_a_thing(edit)(scene, "k", source).instruction)
    assert found == {f"k {thing}" for thing in chosen}


@pytest.mark.parametrize("kind", ["blur_background", "dark_background", "gray_background"])
def test_a_background_is_all_but_what_is_named_or_but_every_thing(kind: str) -> None:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (2, 128, 80, 3)).astype(np.float32)
    named, other = (
        Thing(shape, paint, 10, np.array([[x, 24.0]] * 2), np.zeros(2))
        for shape, paint, x in (("square", "red", 20.0), ("circle", "blue", 60.0))
    )
    scene = Filmed(video, [named, other], rng)
    source = scene.render()
    inside, beside = (covered([thing], source.shape)[..., 0] == 1 for thing in scene.things)
    outside = covered(scene.things, source.shape)[..., 0] == 0
    look, amount = BACKGROUNDS[kind]  # as strong as the benchmark asks for
    as_asked = look(source, amount, 1.0)
    said = set()
    for _ in range(24):
        edit = KINDS[kind].edit(scene, kind, source)
        changed = np.abs(edit.target - source).max(axis=-1) > 0.01
        assert not changed[inside].any()
        assert changed[beside].any() == ("square" in edit.instruction), edit.instruction
        assert changed[outside].mean() > 0.9
        np.testing.assert_allclose(edit.target[outside], as_asked[outside], atol=1e-3)
        assert (edit.about["color"], edit.about["shape"]) == ("red", "square")
        said.add(edit.instruction)
    assert len(said) == 4


def test_a_piece_of_a_photo_that_is_painted_is_a_photo_no_more() -> None:
    rng = np.random.default_rng(0)
    cutout = rng.integers(0, 256, (24, 24, 3), np.uint8)
    where = np.array([[40.0, 24.0]])
    thing = Thing("square", "patterned", 10, where, np.zeros(1), cutout)
    scene = Filmed(np.zeros((1, 48, 80, 3), np.float32), [thing], rng)
    edit = KINDS["recolor"].edit(scene, "recolor", scene.render())
    painted = Filmed(scene.video, [replace(thing, paint=edit.about["to"], cutout=None)], rng)
    np.testing.assert_array_equal(edit.target, painted.render())


def test_a_hue_that_is_there_a_little_is_neither_edited_nor_called_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of blue there is one per cent, of green ten, of the others nothing."""
    monkeypatch.setattr(kinds, "_wording", lambda rng, kind: f"{kind} {{color}} {{to}}")
    source = np.full((2, 10, 100, 3), 128.0, np.float32)
    source[:, :, :1], source[:, :, 1:11] = regions.HUES["blue"], regions.HUES["green"]
    edited: set[tuple[str, ...]] = set()
    absent: set[tuple[str, str]] = set()
    for seed in range(60):
        scene = Filmed(source, [], np.random.default_rng(seed))
        edited.add(tuple(kinds._by_hue(scene, "hue", source).instruction.split()))
        kind, color, to = kinds._nothing(scene, "nothing", source).instruction.split()
        absent |= {(color, to)} if kind == "hue" else set()
    assert {color for _, color, _ in edited} == {"green"}
    assert {to for _, _, to in edited} == set(regions.HUES) - {"green"}
    assert {color for color, _ in absent} == set(regions.HUES) - {"green", "blue"}
    assert all(color != to for color, to in absent)
    assert {"green", "blue"} <= {to for _, to in absent}


def with_blue(pixels: int) -> np.ndarray:
    video = np.full((1, 40, 50, 3), 128.0, np.float32)
    video.reshape(-1, 3)[:pixels] = regions.HUES["blue"]
    return video


@pytest.mark.parametrize(("pixels", "there"), [(38, False), (42, True)])  # two per cent
def test_from_where_a_hue_is_there(pixels: int, there: bool) -> None:
    video = with_blue(pixels)
    found = kinds._by_hue(scene([], video, 0), "hue", video).about["kind"]
    assert found == ("hue" if there else "nothing")


@pytest.mark.parametrize(("pixels", "absent"), [(0, True), (2, False)])
def test_up_to_where_a_hue_is_not(
    monkeypatch: pytest.MonkeyPatch, pixels: int, absent: bool
) -> None:
    monkeypatch.setattr(kinds, "_wording", lambda rng, kind: f"{kind} {{color}}")
    video = with_blue(pixels)
    said = [kinds._nothing(scene([], video, n), "nothing", video).instruction for n in range(200)]
    assert ("hue blue" in said) == absent
    assert sum(words.startswith("hue") for words in said) / 200 == pytest.approx(0.4, abs=0.05)


def test_nothing_is_asked_of_a_thing_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_wording", lambda rng, kind: "{color} {shape}")
    monkeypatch.setattr(regions, "NOTHING", 0)  # so that no hue is absent
    still = np.zeros((1, 2)), np.zeros(1)
    every = [Thing(shape, paint, 1, *still) for paint, shape in product(PAINTS, SHAPES)]
    video = with_blue(2000)
    for seed in range(8):
        said = kinds._nothing(scene(every[:-1], video, seed), "nothing", video).instruction
        assert said.split() == [every[-1].paint, every[-1].shape]


def test_a_thing_becomes_another_paint_and_another_shape() -> None:
    thing = Thing("square", "red", 4, np.full((1, 2), 12.0), np.zeros(1))
    video = np.zeros((1, 24, 24, 3), np.float32)
    for seed in range(40):
        of = scene([thing], video, seed)
        assert kinds._recolor(of, "recolor", video, thing).about["to"] != "red"
        assert kinds._replace(of, "replace", video, thing).about["to"] != "square"


def test_what_is_added_is_in_front_of_all_and_changes_nothing_else() -> None:
    video = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3)).astype(np.float32)
    large = Thing("circle", "red", 44, np.array([[40.0, 24.0]] * 2), np.zeros(2))
    for seed in range(12):
        before = scene([large], video, seed)
        source = before.render()
        edit = KINDS["add"].edit(before, "add", source)
        told = {name: edit.about[name] for name in ("shape", "color", "place")}
        assert all(word in edit.instruction for word in told.values())
        new = resting(told["shape"], told["color"], told["place"], video.shape)
        cover = covered([new], video.shape)[..., 0]
        alone = scene([new], video, 0).render()
        np.testing.assert_array_equal(edit.target[cover == 1], alone[cover == 1])
        np.testing.assert_array_equal(edit.target[cover == 0], source[cover == 0])
        assert before.things == [large]
        np.testing.assert_array_equal(before.render(), source)
