from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.evaluation import metrics


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)


def box() -> np.ndarray:
    mask = np.zeros((5, 32, 48), bool)
    mask[:, 8:24, 8:24] = True
    return mask


def test_perfect_edit_gains_all_and_keeps_the_background(clip: np.ndarray) -> None:
    mask = box()
    truth = clip.copy()
    truth[mask] = 255 - truth[mask]
    values = metrics.clip_metrics(clip, truth, truth, mask, dilate=6)  # SSIM looks 5 pixels around
    assert values["edited_psnr"] == metrics.PSNR_CAP
    assert values["gain"] == pytest.approx(metrics.PSNR_CAP - values["source_psnr"])
    assert values["edited_ssim"] == pytest.approx(1.0, abs=1e-5)
    assert values["background_psnr"] == metrics.PSNR_CAP
    assert values["background_ssim"] == pytest.approx(1.0, abs=1e-5)
    assert values["temporal_inside"] == values["temporal_outside"] == 0.0


def test_unedited_source_gains_nothing(clip: np.ndarray) -> None:
    mask = box()
    truth = clip.copy()
    truth[mask] = 255 - truth[mask]
    values = metrics.clip_metrics(clip, clip, truth, mask, dilate=2)
    assert values["gain"] == 0.0
    assert values["background_psnr"] == metrics.PSNR_CAP
    assert values["temporal_inside"] > 10


def test_psnr_counts_the_region_alone() -> None:
    a = torch.zeros(2, 3, 16, 16)
    b = a.clone()
    b[:, :, :4] = 16.0  # mean square error 256 inside, 0 elsewhere
    region = torch.zeros(2, 16, 16, dtype=torch.bool)
    region[:, :4] = True
    assert metrics.psnr(a, b, region) == pytest.approx(10 * np.log10(255**2 / 256), abs=1e-3)
    assert metrics.psnr(a, b, ~region) == metrics.PSNR_CAP


def test_flicker_is_temporal_error_and_a_constant_shift_is_not() -> None:
    still = torch.full((4, 3, 8, 8), 100.0)
    flicker = still.clone()
    flicker[1::2] += 10
    everywhere = torch.ones(4, 8, 8, dtype=torch.bool)
    assert metrics.temporal_error(flicker, still, everywhere) == pytest.approx(10.0)
    assert metrics.temporal_error(still + 25, still, everywhere) == 0.0


def test_grow_adds_pixels_on_every_side() -> None:
    region = torch.zeros(1, 9, 9, dtype=torch.bool)
    region[0, 4, 4] = True
    assert metrics.grow(region, 2).sum() == 25
    assert torch.equal(metrics.grow(region, 0), region)


def test_damage_near_the_edit_does_not_count_as_background(clip: np.ndarray) -> None:
    mask = box()
    edit = clip.copy()
    edit[:, 6:8, 8:24] = 0
    near = metrics.clip_metrics(clip, edit, clip, mask, dilate=4)
    counted = metrics.clip_metrics(clip, edit, clip, mask, dilate=0)
    assert near["background_psnr"] == metrics.PSNR_CAP
    assert counted["background_psnr"] < 40


def test_empty_region_leaves_its_metrics_out(clip: np.ndarray) -> None:
    values = metrics.clip_metrics(clip, clip, clip, np.zeros(clip.shape[:3], bool), dilate=8)
    assert "gain" not in values
    assert "background_psnr" in values


def test_shapes_that_differ_are_named(clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"edit \(4, 32, 48, 3\)"):
        metrics.clip_metrics(clip, clip[:4], clip, box(), dilate=8)


def test_summary_counts_successes_over_clips_that_have_an_edit() -> None:
    clips = [{"gain": 6.0, "recomputed": 1.0}, {"gain": 2.0, "recomputed": 0.5}, {"recomputed": 0}]
    values = metrics.summary(clips, success_db=4.0)
    assert values["success"] == 0.5
    assert values["gain"] == 4.0
    assert values["recomputed"] == 0.5
