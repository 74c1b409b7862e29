"""data/footage: looks, hues and weather as numbers, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from data.footage import looks, regions, weather


def test_looks_are_what_they_are_called() -> None:
    video = np.random.default_rng(1).uniform(0, 255, (2, 32, 48, 3)).astype(np.float32)
    grey = looks.colourless(video, 1.0, 1.0)
    luma = video @ np.array([0.299, 0.587, 0.114], np.float32)
    np.testing.assert_allclose(grey, np.repeat(luma[..., None], 3, -1), atol=1e-3)
    np.testing.assert_allclose(looks.negative(video, 1.0, 1.0), 255 - video)
    cells = looks.mosaic(video, 1.0, 1.0).reshape(2, 4, 8, 6, 8, 3)
    expected = video.reshape(2, 4, 8, 6, 8, 3).mean(axis=(2, 4), keepdims=True)
    np.testing.assert_allclose(cells, np.broadcast_to(expected, cells.shape), atol=1e-2)
    haze = np.abs(looks.fog(np.zeros_like(video), 1.0, 1.0)).mean(axis=(0, 2, 3))
    assert (np.diff(haze) < 0).all()  # thicker the higher
    lit = looks.light_from(np.full_like(video, 100), "left", 1.0).mean(axis=(0, 1, 3))
    assert (np.diff(lit) < 0).all()


def test_in_tiny_pictures_squares_are_of_two_pixels_and_a_drop_falls() -> None:
    video = np.random.default_rng(0).uniform(0, 255, (1, 4, 4, 3)).astype(np.float32)
    cells = looks.mosaic(video, 0.55, 0.1).reshape(1, 2, 2, 2, 2, 3)
    assert np.ptp(cells, axis=(2, 4)).max() == 0
    drops = weather._fall((1, 4, 4, 3), 1e-6, (1, 2), 0.1, 1, 1.0, np.random.default_rng(0))
    assert drops.max() > 0


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


def test_a_hue_is_turned_and_others_stay() -> None:
    video = np.zeros((1, 1, 3, 3), np.float32)
    video[0, 0] = (60, 150, 60), (200, 40, 40), (120, 120, 120)
    weight = regions.hue_weight(video, "green")
    assert weight[0, 0, :, 0] == pytest.approx([1, 0, 0])
    turned = regions.turn_hue(video, weight, "green", "purple")
    np.testing.assert_allclose(turned[0, 0, 1:], video[0, 0, 1:])
    luma, u, v = regions.TO_YUV @ turned[0, 0, 0]
    before, u0, v0 = regions.TO_YUV @ video[0, 0, 0]
    assert luma == pytest.approx(before, abs=0.1)
    angle = np.arctan2(v, u) - np.arctan2(v0, u0)
    wanted = regions.hue_angle("purple") - regions.hue_angle("green")
    assert np.cos(angle - wanted) == pytest.approx(1, abs=1e-4)


def test_a_drop_falls_at_its_speed_and_goes_around() -> None:
    """Of a picture of twice the usual height: one drop, whose place is told by its brightest."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cover = weather._fall((6, 256, 300, 3), 1e-9, (3, 5), 0.0, 4, 2.0, rng)[..., 0]
        heads = []
        for frame in cover:
            rows, columns = np.nonzero(frame == frame.max())
            assert len(rows) == 8  # four pixels long, of twice the size
            assert np.ptp(columns) == 0
            (head,) = [row for row in rows if (row + 1) % 256 not in rows]
            heads.append(head)
            below, beside = frame[(head + 1) % 256, columns[0]], frame[head, (columns[0] + 1) % 300]
            assert (below, beside) == pytest.approx([0.4 * frame.max()] * 2)  # a soft edge
        steps = np.diff(heads) % 256
        assert steps.min() >= 6 - 1
        assert steps.max() <= 10 + 1
        assert np.ptp(steps) <= 1
