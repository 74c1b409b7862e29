"""data/footage: borders and numbers of what is drawn, worked out by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from data.drawing import SHAPES
from data.footage import kinds, looks, regions, weather
from data.footage.kinds import Filmed
from data.footage.objects import PAINTS, Thing, draw


def pixel(angle: float, chroma: float) -> np.ndarray:
    """[1, 1, 1, 3] of mean brightness, its hue at `angle` radians."""
    yuv = np.array([128, chroma * np.cos(angle), chroma * np.sin(angle)])
    return (regions.FROM_YUV @ yuv).astype(np.float32)[None, None, None]


@pytest.mark.parametrize("color", regions.HUES)
@pytest.mark.parametrize(
    ("degrees", "chroma", "weight"),
    [
        (0, 60, 1), (14.9, 60, 1), (18, 60, 0.84375), (21, 60, 0.5), (27.1, 60, 0), (180, 60, 0),
        (0, 13.9, 0), (0, 18, 0.15625), (0, 22, 0.5), (0, 30.1, 1), (21, 22, 0.25),
    ],
)  # fmt: skip
def test_a_hue_ends_softly_at_its_neighbours_and_at_grey(
    color: str, degrees: float, chroma: float, weight: float
) -> None:
    for side in (-1, 1):  # also around the end of the circle
        video = pixel(regions.hue_angle(color) + side * np.deg2rad(degrees), chroma)
        assert regions.hue_weight(video, color).item() == pytest.approx(weight, abs=2e-3)


def scene(things: list[Thing], video: np.ndarray, seed: int) -> Filmed:
    return Filmed(video, things, np.random.default_rng(seed))


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


def test_light_comes_from_the_upper_left_of_a_thing() -> None:
    video = np.zeros((1, 40, 40, 3), np.float32)
    draw(video, Thing("square", "green", 10, np.full((1, 2), 20.0), np.zeros(1)))
    greens = [video[0, at, at, 1] for at in (12, 27)]  # 7.5 pixels from the middle
    assert greens == pytest.approx([150 * 1.12, 150 * 0.88], abs=1.5)


def test_in_tiny_pictures_squares_are_of_two_pixels_and_a_drop_falls() -> None:
    video = np.random.default_rng(0).uniform(0, 255, (1, 4, 4, 3)).astype(np.float32)
    cells = looks.mosaic(video, 0.55, 0.1).reshape(1, 2, 2, 2, 2, 3)
    assert np.ptp(cells, axis=(2, 4)).max() == 0
    drops = weather._fall((1, 4, 4, 3), 1e-6, (1, 2), 0.1, 1, 1.0, np.random.default_rng(0))
    assert drops.max() > 0
