"""data/footage/camera.py: where a camera looks, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.footage import camera
from data.footage.camera import film
from data.footage.material import Material, prepare
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


def test_each_frame_is_of_the_picture_that_is_shown_then() -> None:
    """Forwards, backwards, for long and again."""
    pictures = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(20, 1).repeat(30, 2)
    pictures = pictures.repeat(3, 3)
    shown = np.array([2, 0, 0, 1, 2, 2, 3, 2])
    still = np.zeros(len(shown))
    path = camera.Path(np.tile([15.0, 10.0], (len(shown), 1)), still + 1, still, False)
    view = camera.shoot(pictures, shown, path, 1, 8, 12)
    assert (view == shown[:, None, None, None]).all()


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


@pytest.mark.parametrize(
    ("size", "closest", "widest"),
    [
        ((90, 160), 10 / 6, 10),  # a sixth of the picture's side is the closest
        ((27, 64), 0.5, 3),  # but no closer than half a pixel of the picture; a row is all of it
        ((36, 40), 0.5, 2.5),
        ((4, 16), 3 / 9, 4 / 9),  # but of a picture that is so small at least three quarters
    ],
)
def test_how_close_and_how_far_a_camera_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    closest: float,
    widest: float,
) -> None:
    """In pixels of the picture for one of a view of 9 x 16, which shows `widest` at the most."""
    np.save(tmp_path / "a.npy", np.zeros((1, *size, 3), np.uint8))
    picture = Material("a.png", "photo", (str(tmp_path / "a.npy"),))
    asked: list[float] = []
    path = camera._path

    def asking(*given: Any) -> camera.Path:
        asked.append(given[4])
        return path(*given)

    monkeypatch.setattr(camera, "_path", asking)
    for seed in range(120):
        film(picture, 2, 9, 16, np.random.default_rng(seed))
    assert (min(asked), max(asked)) == pytest.approx((closest, widest), rel=0.1)
    assert closest * 0.999 <= min(asked)
    assert max(asked) <= widest * 1.001


class Hurried(np.random.Generator):
    """Draws what a very fast hand would hold: a speed, then no sway and no zoom."""

    def __init__(self, speed: float, seed: int) -> None:
        super().__init__(np.random.PCG64(seed))
        self.draws = iter((speed, 0.0))

    def exponential(self, *_: Any) -> float:  # type: ignore[override]
        return next(self.draws)

    def normal(self, mean: float, spread: float, size: int | None = None) -> Any:  # type: ignore[override]
        return 0.0 if size is None else np.zeros(size)


@pytest.mark.parametrize(("drawn", "moved"), [(2.5, 2.5), (5.9, 5.9), (40, 6)])
@pytest.mark.parametrize("scale", [0.5, 3])
def test_a_view_moves_by_its_own_pixels_a_frame_and_by_six_at_the_most(
    drawn: float, moved: float, scale: float
) -> None:
    vast = (100_000, 100_000)  # no border is near
    paces = []
    for seed in range(12):
        path = camera._path("photo", 9, (48, 80), vast, scale, Hurried(drawn, seed))
        paces.append(np.hypot(*np.diff(camera.drift(path), axis=0).T))
    found = np.array(paces)
    moving = found.max(axis=1) > 0
    assert moving.sum() >= 6  # a quarter rests
    np.testing.assert_allclose(found[moving], moved, rtol=1e-6)
