from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data.bench.cases import CASES
from data.bench.clip import BenchClip, make_clip
from pipelines.evaluation.bench.measures import ENDS, measure

FRAMES, HEIGHT, WIDTH = 20, 48, 64
STAYS = np.broadcast_to(np.eye(2, 3), (FRAMES - 1, 2, 3))
RECOLOR, NOTHING = CASES[1], CASES[53]


def made(case: Any = RECOLOR, **changes: Any) -> BenchClip:
    """Noise with a light square of 16 pixels that becomes 40 levels darker."""
    rng = np.random.default_rng(0)
    source = rng.integers(60, 120, (FRAMES, HEIGHT, WIDTH, 3)).astype(np.uint8)
    truth = source.copy()
    if case.kind != "nothing":
        source[:, 16:32, 16:32] = 200
        truth[:, 16:32, 16:32] = 160
    clip = BenchClip(case, "make it so", source, truth, STAYS, STAYS, ())
    return replace(clip, **changes)


def test_the_right_edit_is_right() -> None:
    clip = made()
    values = measure(clip, clip.truth, dilate=8)
    assert values["gain"] == pytest.approx(100 - 20 * np.log10(255 / 40))
    assert values["edited_ssim"] == pytest.approx(1)
    assert values["background_psnr"] == 100
    assert values["false_edits"] == values["temporal_inside"] == values["temporal_outside"] == 0
    assert values["sharpness"] == pytest.approx(1)
    assert values["drift"] == 0
    assert "kept_psnr" not in values


def test_doing_nothing_gains_nothing() -> None:
    clip = made()
    values = measure(clip, clip.source, dilate=8)
    assert values["gain"] == 0
    assert values["background_psnr"] == 100
    assert values["false_edits"] == 0


def test_an_error_counts_where_it_is() -> None:
    clip = made()
    inside, near, far = (clip.truth.copy() for _ in range(3))
    inside[:, 16:32, 16:32] += 10
    near[:, 12:16, 16:32] += 10
    far[:, :8, :] += 10
    values = [measure(clip, edit, dilate=8) for edit in (inside, near, far)]
    assert values[0]["edited_psnr"] == pytest.approx(20 * np.log10(25.5))
    assert values[0]["background_psnr"] == 100
    assert values[1]["edited_psnr"] == values[1]["background_psnr"] == 100
    around = HEIGHT * WIDTH - 16 * 16  # of what counts where nothing around the edit is left out
    assert measure(clip, near, dilate=0)["background_psnr"] == pytest.approx(
        20 * np.log10(25.5) + 10 * np.log10(around / (4 * 16))
    )
    outside = HEIGHT * WIDTH - 32 * 32
    assert values[2]["background_psnr"] == pytest.approx(
        20 * np.log10(25.5) + 10 * np.log10(outside / (8 * WIDTH))
    )


def test_an_edit_of_nothing_is_false() -> None:
    clip = made(NOTHING)
    edit = clip.source.copy()
    edit[:, 8:16, 8:24, 0] += 20  # two blocks of 48
    values = measure(clip, edit, dilate=8)
    assert values["false_edits"] == pytest.approx(2 / 48)
    assert values["kept_psnr"] == pytest.approx(
        20 * np.log10(255 / 20) + 10 * np.log10(3 * HEIGHT * WIDTH / (8 * 16))
    )
    assert "gain" not in values
    assert "background_psnr" not in values
    edit[:, 8:16, 8:24, 0] -= 5  # by 15 levels: no edit, blur
    assert measure(clip, edit, dilate=8)["false_edits"] == 0
    edit[:, 8:16, 8:24, 0] += 1  # on the border
    assert measure(clip, edit, dilate=8)["false_edits"] == 0


def differing(pixels: int) -> BenchClip:
    """So many pixels of each frame are edited, block by block."""
    clip = replace(made(NOTHING), case=RECOLOR)
    blocks = np.arange(HEIGHT * WIDTH).reshape(HEIGHT // 8, 8, WIDTH // 8, 8).swapaxes(1, 2)
    clip.truth.reshape(FRAMES, -1, 3)[:, blocks.ravel()[:pixels]] += 40
    return clip


@pytest.mark.parametrize(
    ("edited", "inside", "outside"),
    [(6, False, True), (7, True, True), (2918, True, True), (2919, True, False)],
)
def test_only_regions_of_some_size_count(edited: int, inside: bool, outside: bool) -> None:
    """Of 3072 pixels 0.2 % inside, 5 % outside; each figure goes with its region."""
    clip = differing(edited)
    values = measure(clip, np.roll(clip.truth, 1, axis=0), dilate=0)
    of_inside = {"gain", "edited_psnr", "source_psnr", "edited_ssim", "temporal_inside"}
    of_outside = {"background_psnr", "background_ssim", "temporal_outside", "false_edits"}
    assert (of_inside & values.keys()) == (of_inside if inside else set())
    assert (of_outside & values.keys()) == (of_outside if outside else set())
    assert "sharpness" in values


def test_of_a_picture_without_edges_nothing_is_sharp() -> None:
    clip = made(NOTHING)
    clip.source[:] = clip.truth[:] = 100
    assert "sharpness" not in measure(clip, clip.source, dilate=8)


def test_flicker_is_what_changes_of_the_error() -> None:
    clip = made()
    steady, flickering = clip.truth.copy(), clip.truth.copy()
    steady[:, 16:32, 16:32] += 6
    flickering[::2, 16:32, 16:32] += 6
    assert measure(clip, steady, dilate=8)["temporal_inside"] == 0
    assert measure(clip, flickering, dilate=8)["temporal_inside"] == pytest.approx(6)
    assert measure(clip, flickering, dilate=8)["temporal_outside"] == 0


def test_what_flickers_in_the_scene_is_no_error() -> None:
    clip = made()
    for video in (clip.source, clip.truth):  # outside as inside, each by levels of its own
        video[::2, :, 40:] += 20
    clip.truth[::3, 16:32, 16:32] -= 30
    values = measure(clip, clip.truth, dilate=8)
    assert values["temporal_inside"] == values["temporal_outside"] == 0


def test_an_error_that_moves_with_the_scene_does_not_flicker() -> None:
    """The camera goes right by two pixels a frame, and so does a blotch in the background left."""
    moves = STAYS.copy()
    moves[:, 0, 2] = 2
    clip = made(NOTHING, camera=moves)
    blotch = np.random.default_rng(1).integers(0, 50, (HEIGHT, WIDTH + 2 * FRAMES, 1))
    with_it, stuck = clip.source.copy(), clip.source.copy()
    for n in range(FRAMES):
        with_it[n] += blotch[:, 2 * n : 2 * n + WIDTH].astype(np.uint8)
        stuck[n] += blotch[:, :WIDTH].astype(np.uint8)
    assert measure(clip, with_it, dilate=8)["temporal_outside"] < 1e-3
    assert measure(clip, stuck, dilate=8)["temporal_outside"] > 10
    cut = replace(clip, camera=np.full_like(moves, np.nan))
    assert "temporal_outside" not in measure(cut, stuck, dilate=8)


@pytest.mark.parametrize("name", ["drawn-02-recolor", "drawn-05-recolor", "drawn-11-recolor"])
def test_the_motion_of_a_clip_is_that_of_its_pixels(name: str) -> None:
    """A turned and moved thing keeps its difference to the source, so only sampling is left."""
    case = next(case for case in CASES if case.name == name)
    clip = make_clip(case, None, (64, 112))
    assert case.speed == "fast"
    right = measure(clip, clip.source, dilate=8)["temporal_inside"]
    unmoved = replace(clip, edited=np.where(np.isnan(clip.edited), np.nan, np.eye(2, 3)))
    assert right < 0.5 * measure(unmoved, clip.source, dilate=8)["temporal_inside"]


def test_blur_is_not_sharp() -> None:
    clip = made()
    edit = clip.truth.copy()
    edit[:, :, 1:] = (edit[:, :, 1:].astype(int) + edit[:, :, :-1]) // 2
    assert 0.5 < measure(clip, edit, dilate=8)["sharpness"] < 0.9


def test_drift_is_the_first_against_the_last() -> None:
    clip = made()
    edit = clip.truth + 1
    ends = round(ENDS * FRAMES)
    edit[-ends:-1] += 9
    drift = 10 * np.log10(((ends - 1) * 100 + 1) / ends)
    assert measure(clip, edit, dilate=8)["drift"] == pytest.approx(drift)
    edit[-ends - 1] += 50
    assert measure(clip, edit, dilate=8)["drift"] == pytest.approx(drift)


def test_long_clips_are_measured_as_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In stretches of 7 frames or at once: the same, with what changes between stretches."""
    clip = made()
    noise = np.random.default_rng(2).integers(0, 30, clip.truth.shape).astype(np.uint8)
    whole = measure(clip, clip.truth + noise, dilate=8)
    monkeypatch.setattr("pipelines.evaluation.bench.measures.STRETCH", 7)
    assert measure(clip, clip.truth + noise, dilate=8) == pytest.approx(whole, rel=1e-5)


def test_an_edit_of_another_shape_is_refused() -> None:
    clip = made()
    with pytest.raises(ValueError, match="drawn-01-recolor"):
        measure(clip, clip.truth[:-1], dilate=8)
