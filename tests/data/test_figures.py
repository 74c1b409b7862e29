"""How drawn things look, of training pairs and of the benchmark: against the whole picture's plane.

What draws them works on a patch of its own around each, blended into the picture at its borders.
Here the same is computed at every pixel.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.drawing import SHAPES, paste
from data.footage.objects import PAINTS, Thing, covered, draw
from data.kinds import COLOURS, Figure
from data.synthetic import draw_figure

HEIGHT, WIDTH = 40, 56
FINER = 5  # the same scene in a picture of five times the size
CENTRES = np.array([
    (30.3, 18.8), (2.6, 20.1), (53.9, 11.2), (20.4, 1.7), (33.5, 38.4), (-4.2, 44.1), (20.25, 22.0),
    (90.0, 20.0), (25.0, -60.0), (25.5, 20.0),
])  # fmt: skip
ANGLES = np.linspace(-1.1, 2.3, len(CENTRES))
RADIUS = 9.7
BACK = 90.0


def seen_at(
    shape: str, radius: float, wider: float = 0.0, finer: int = 1
) -> tuple[np.ndarray, ...]:
    """Share of each pixel that the shape covers, then where the pixel's middle lies from that of
    the shape, (x, y) on the screen and in the shape's own axes; each [F, H, W]."""
    rows, columns = np.mgrid[: HEIGHT * finer, : WIDTH * finer] + 0.5
    x = columns - finer * CENTRES[::finer, 0, None, None]
    y = rows - finer * CENTRES[::finer, 1, None, None]
    turned = (x + 1j * y) * np.exp(-1j * ANGLES[::finer])[:, None, None]
    share = np.clip(0.5 - (SHAPES[shape](turned.real, turned.imag, radius) - wider), 0, 1)
    return share[..., None], x, y, turned.real, turned.imag


def lit(paint: tuple[int, int, int], x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Brighter by a sixth towards the upper left, darker towards the lower right."""
    light = 1 - 0.16 * np.clip((x + y) / (2 * radius), -1, 1)
    return np.clip(np.array(paint) * light[..., None], 0, 255)


@pytest.mark.parametrize(("radius", "finer"), [(1.3, 1), (RADIUS, 1), (6 * RADIUS, FINER)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_is_whole_wherever_it_is(shape: str, radius: float, finer: int) -> None:
    share, x, y, *_ = seen_at(shape, radius, finer=finer)
    on = finer * CENTRES[::finer], ANGLES[::finer]
    for paint in ("orange", "blue"):
        wanted = BACK + (lit(PAINTS[paint], x, y, radius) - BACK) * share
        for thing, paints in (
            (Thing(shape, paint, radius, *on), draw),
            (Figure(shape, paint, radius, *on), draw_figure),
        ):
            video = np.full(wanted.shape, BACK, np.float32)
            paints(video, thing)  # type: ignore[operator]
            np.testing.assert_allclose(video, wanted, atol=1e-2)
    cover = covered([Thing(shape, "red", radius, *on)], video.shape)
    np.testing.assert_allclose(cover, share, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_goes_around_all_of_a_figure(shape: str) -> None:
    """To the tips of a large one, too."""
    radius = 6 * RADIUS
    share, x, y, *_ = seen_at(shape, radius, finer=FINER)
    around = seen_at(shape, radius, wider=0.2 * radius, finer=FINER)[0]
    wanted = BACK + (np.array(COLOURS["cyan"]) - BACK) * around
    wanted = wanted + (lit(COLOURS["pink"], x, y, radius) - wanted) * share
    video = np.full(wanted.shape, BACK, np.float32)
    on = FINER * CENTRES[::FINER], ANGLES[::FINER]
    draw_figure(video, Figure(shape, "pink", radius, *on, outline="cyan"))
    np.testing.assert_allclose(video, wanted, atol=1e-2)


@pytest.mark.parametrize("shape", ["square", "star"])
def test_a_cutout_turns_with_its_thing_and_covers_it_to_the_tips(shape: str) -> None:
    """Its picture is 2.9 radii wide and as high; each level is a place of its own."""
    side = 12
    rows, columns = np.mgrid[:side, :side]
    cutout = np.stack([20 * rows, 20 * columns, rows + columns], axis=-1).astype(np.uint8)
    share, _, _, own_x, own_y = seen_at(shape, RADIUS)
    at = (np.clip((own / (2.9 * RADIUS) + 0.5) * side, 0, side - 1) for own in (own_y, own_x))
    wanted = BACK + (cutout[tuple(place.astype(int) for place in at)] - BACK) * share
    video = np.full((len(CENTRES), HEIGHT, WIDTH, 3), BACK, np.float32)
    draw(video, Thing(shape, "patterned", RADIUS, CENTRES, ANGLES, cutout))
    np.testing.assert_allclose(video, wanted, atol=1e-2)


def test_a_patch_is_pasted_pixel_by_pixel_as_far_as_there_is_a_picture() -> None:
    centres = np.array([(3.9, 2.0), (0.2, 5.9), (7.7, 0.3), (-1.5, 2.0), (9.5, 3.0), (4.0, 8.0)])
    rng = np.random.default_rng(0)
    paint, share = rng.uniform(0, 255, (6, 5, 5, 3)), rng.uniform(0.2, 1, (6, 5, 5))
    video = rng.uniform(0, 255, (6, 6, 8, 3))
    wanted = video.copy()
    for frame, (x, y) in enumerate(centres):
        for row, column in np.ndindex(5, 5):
            at = math.floor(y) + row - 2, math.floor(x) + column - 2
            if 0 <= at[0] < 6 and 0 <= at[1] < 8:
                of = share[frame, row, column]
                wanted[frame, *at] = (1 - of) * wanted[frame, *at] + of * paint[frame, row, column]
    paste(video, centres, paint, share)
    np.testing.assert_allclose(video, wanted)
