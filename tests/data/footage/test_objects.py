"""data/footage/objects.py: how things look, how large they are and how they move."""

from __future__ import annotations

import numpy as np
import pytest

from data.footage.objects import Thing, covered, draw, moving, resting


def test_what_is_drawn_last_hides_what_is_under_it() -> None:
    def thing(paint: str, x: float) -> Thing:
        return Thing("square", paint, 10, np.array([[x, 24.0]]), np.zeros(1))

    video = np.zeros((1, 48, 80, 3), np.float32)
    under, over = thing("white", 36.0), thing("black", 44.0)
    draw(video, under)
    draw(video, over)
    assert video[0, 24, 30].min() > 200
    assert video[0, 24, 42].max() < 30
    cover = covered([under, over], video.shape)[0, 24, :, 0]
    assert cover[[30, 42, 50]].tolist() == [1, 1, 1]
    assert cover[[5, 70]].tolist() == [0, 0]


def test_light_comes_from_the_upper_left_of_a_thing() -> None:
    video = np.zeros((1, 40, 40, 3), np.float32)
    draw(video, Thing("square", "green", 10, np.full((1, 2), 20.0), np.zeros(1)))
    greens = [video[0, at, at, 1] for at in (12, 27)]  # 7.5 pixels from the middle
    assert greens == pytest.approx([150 * 1.12, 150 * 0.88], abs=1.5)


def test_things_turn_by_the_second_whatever_the_rate() -> None:
    turned = {}
    for fps in (8, 16):
        pan = np.zeros((17, 2))
        drawn = [
            moving("star", "red", (17, 48, 80), fps, pan, np.random.default_rng(seed))
            for seed in range(60)
        ]
        turned[fps] = [(thing.angles[fps] - thing.angles[0]) for thing in drawn]  # in a second
    assert turned[8] == pytest.approx(turned[16])
    assert 20 < np.count_nonzero(turned[8]) < 40  # about half stand still
    assert min(turned[8]) == pytest.approx(-0.8, abs=0.1)
    assert max(turned[8]) == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize(("height", "width", "unit"), [(48, 96, 48), (96, 48, 32)])
def test_things_are_as_large_in_upright_pictures(height: int, width: int, unit: int) -> None:
    """Of their shorter side, which counts for two thirds where it is the width."""
    shape, pan = (2, height, width), np.zeros((2, 2))
    draws = [np.random.default_rng(seed) for seed in range(30)]
    drawn = [moving("star", "red", shape, 8, pan, draw) for draw in draws]
    radii = np.array([thing.radius for thing in drawn]) / unit
    assert radii.min() == pytest.approx(0.13, abs=0.02)
    assert radii.max() == pytest.approx(0.24, abs=0.02)
    assert resting("star", "red", "in the middle", shape).radius == pytest.approx(0.16 * unit)
    centres = np.concatenate([thing.centres for thing in drawn])
    assert (centres >= 0.2 * unit - 1e-6).all()
    assert (centres <= np.array([width, height]) - 0.2 * unit + 1e-6).all()


def test_a_still_thing_goes_along_with_what_is_filmed() -> None:
    pan = np.cumsum(np.random.default_rng(0).uniform(-0.5, 0.5, (9, 2)), axis=0)
    along = 0
    for seed in range(60):
        thing = moving("star", "red", (9, 48, 80), 8, pan, np.random.default_rng(seed))
        along += np.allclose(np.diff(thing.centres, axis=0), np.diff(pan, axis=0))
    assert 6 <= along <= 18  # a fifth of all things stand still, the others have ways of their own
