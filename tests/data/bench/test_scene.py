"""data/bench/scene.py: where a camera looks, what it shows of a backdrop, how things move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.bench import scene
from data.bench.scene import PAN, Shot, on_canvas, on_footage, way
from data.footage.camera import affine, drift
from data.footage.material import Material

SIZE = (18, 32)


def material(folder: Path, kind: str, frames: int, height: int, width: int) -> Material:
    """Three levels whose pixels say their level."""
    names = []
    for level in range(3):
        names.append(str(folder / f"{kind}-{frames}-{height}-{level}.npy"))
        np.save(names[-1], np.full((frames, height >> level, width >> level, 3), level, np.uint8))
    return Material("a", kind, tuple(names))


def corners(shot: Shot, frame: int) -> np.ndarray:
    """Where a view's corners lie on the first level, [4, 2] (x, y)."""
    matrix = np.array(affine(shot.path, frame, 1, *SIZE)).reshape(2, 3)
    ends = [(x, y, 1) for x in (0, SIZE[1]) for y in (0, SIZE[0])]
    return np.array([matrix @ end for end in ends])


@pytest.mark.parametrize("speed", PAN)
@pytest.mark.parametrize(("height", "width"), [(180, 320), (160, 64), (40, 400)])
def test_a_camera_stays_in_the_picture_and_as_close_as_it_is(
    tmp_path: Path, speed: str, height: int, width: int
) -> None:
    photo = material(tmp_path, "photo", 1, height, width)
    fit = min(height / SIZE[0], width / SIZE[1])
    shares, paces = [], []
    for seed in range(24):
        shot = on_footage(photo, SIZE, 40, speed, np.random.default_rng(seed))
        assert np.ptp(shot.path.scales) == 0
        assert not shot.path.mirrored
        shares.append(shot.path.scales[0] / fit)
        paces.append(np.hypot(*np.diff(drift(shot.path), axis=0).T))
        level = int(shot.pictures[0, 0, 0, 0])
        assert level == np.clip(np.round(np.log2(shot.path.scales[0])), 0, 2)
        assert (shot.step, shot.frames) == (2**level, 40)
        found = np.array([corners(shot, n) for n in range(40)])
        assert found.min() >= 0
        assert (found <= (width, height)).all()
    assert 0.45 <= min(shares) < 0.55
    assert 0.7 < max(shares) <= 0.8
    assert np.median(paces) == pytest.approx(PAN[speed] * SIZE[0])


@pytest.mark.parametrize("speed", PAN)
def test_a_camera_pans_by_a_share_of_its_view_a_frame_and_turns_back_at_borders(speed: str) -> None:
    paces = []
    for seed in range(12):
        shot = on_canvas(SIZE, 120, speed, np.random.default_rng(seed))
        assert shot.pictures.shape == (1, 27, 48, 3)  # one and a half of the view
        paces.append(np.hypot(*np.diff(drift(shot.path), axis=0).T))
        assert np.abs(shot.path.angles).max() <= 0.015
        assert (np.ptp(shot.path.angles) > 0) == (speed != "still")
        found = np.array([corners(shot, n) for n in range(120)])
        assert found.min() >= 0
        assert (found <= (48, 27)).all()
    np.testing.assert_allclose(np.median(paces, axis=1), PAN[speed] * SIZE[0], atol=1e-6)
    begun = [on_canvas(SIZE, 1, speed, np.random.default_rng(seed)) for seed in range(60)]
    starts = np.array([shot.path.centres[0] / (48, 27) for shot in begun])
    assert np.ptp(starts, axis=0).min() > 0.2  # anywhere


@pytest.mark.parametrize(("length", "frames"), [(30, 9), (9, 9), (4, 9), (2, 9)])
def test_a_clip_is_shown_as_it_goes_on_and_back_where_it_ends(
    tmp_path: Path, length: int, frames: int
) -> None:
    clip = material(tmp_path, "clip", length, 54, 96)
    firsts = set()
    for seed in range(80):
        shown = on_footage(clip, SIZE, frames, "slow", np.random.default_rng(seed)).shown
        firsts.add(int(shown[0]))
        assert (shown >= 0).all()
        assert (shown < length).all()
        assert (np.abs(np.diff(shown)) == 1).all()
        if length < frames:
            assert set(shown.tolist()) == set(range(length))
        else:
            assert (np.diff(shown) == 1).all()
    assert (min(firsts), max(firsts)) == (0, max(0, length - frames))


def test_a_thing_stays_in_the_picture_and_as_fast_as_asked_for() -> None:
    """A still one goes along with what is seen behind it."""
    turned, gone = {}, {}
    for speed in PAN:
        spins, steps = [], []
        for seed in range(40):
            rng = np.random.default_rng(seed)
            shot = on_canvas(SIZE, 17, speed, rng)
            centres, angles = way(shot, SIZE, 8, speed, rng)
            margin = 0.2 * SIZE[0]
            assert (centres >= margin - 1e-9).all()
            assert (centres <= np.array(SIZE[::-1]) - margin + 1e-9).all()
            spins.append(abs(angles[8] - angles[0]))  # in a second
            steps.append(np.hypot(*np.diff(centres, axis=0).T))
            if speed == "still":
                np.testing.assert_allclose(np.diff(drift(shot.path), axis=0), 0, atol=1e-9)
                np.testing.assert_allclose(np.diff(centres, axis=0), 0, atol=1e-9)
        turned[speed], gone[speed] = max(spins), np.median(steps)
    assert turned["still"] == 0
    assert gone["fast"] == pytest.approx(3 * gone["slow"], rel=0.2)
    for speed in ("slow", "fast"):
        assert turned[speed] == pytest.approx(0.9 * scene.PACE[speed], rel=0.15)
