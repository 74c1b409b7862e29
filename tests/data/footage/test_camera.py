"""data/footage/camera.py: where a camera looks, and when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.footage import camera
from data.footage.camera import film
from data.footage.material import prepare
from infra.runtime.errors import UserError
from tests.data.footage.conftest import SIZE


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_seen_moves_as_the_drift_says(mirrored: bool) -> None:
    picture = np.zeros((1, 60, 90, 3), np.uint8)
    picture[:, 28:32, 43:47] = 255  # around (45, 30)
    centres = np.array([[45.0, 30.0], [40.0, 32.0], [52.0, 27.0]])
    path = camera.Path(centres, np.full(3, 0.5), np.zeros(3), mirrored)
    view = camera.shoot(picture, np.zeros(3, int), path, 1, 48, 80)
    bright = [np.argwhere(frame[..., 0] > 128).mean(axis=0)[::-1] for frame in view]  # (x, y)
    moved = np.array(bright) - bright[1]
    np.testing.assert_allclose(moved, camera.drift(path), atol=0.5)
    assert np.abs(moved).max() > 10


def test_a_clip_is_seen_from_end_to_end_both_ways_and_never_around() -> None:
    seen = [camera._stretch(20, 9, np.random.default_rng(seed)) for seed in range(200)]
    assert {step for _, step in seen} == {1, 2, -1, -2}
    shown = np.array([first + step * np.arange(9) for first, step in seen])
    assert (shown.min(), shown.max()) == (0, 19)


def test_a_clip_of_just_as_many_frames_is_filmed_from_its_first_to_its_last() -> None:
    seen = {camera._stretch(9, 9, np.random.default_rng(seed)) for seed in range(60)}
    assert seen == {(0, 1), (8, -1)}
    for length, steps in ((17, {1, -1}), (18, {1, 2, -1, -2})):  # twice as fast from twice as many
        draws = [np.random.default_rng(seed) for seed in range(60)]
        assert {camera._stretch(length, 9, rng)[1] for rng in draws} == steps
    with pytest.raises(UserError, match="a clip of 8 frames is too short for pairs of 9"):
        camera._stretch(8, 9, np.random.default_rng(0))
    assert camera._stretch(1, 9, np.random.default_rng(0)) == (0, 0)  # a photo


def test_a_view_never_leaves_the_picture(tmp_path: Path) -> None:
    for name, size in (("wide.png", (300, 60)), ("tall.png", (60, 300))):
        Image.new("RGB", size, "white").save(tmp_path / name)
    (tmp_path / "heldout.txt").write_text("")
    white = prepare(tmp_path, tmp_path / "prepared", fps=16, **SIZE)["train"]
    for seed in range(300):
        rng = np.random.default_rng(seed)
        view, _ = film(white.photos[seed % 2], 9, 48, 80, rng)
        assert view.min() == 255, seed
