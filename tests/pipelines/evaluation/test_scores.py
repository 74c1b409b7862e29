from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.evaluation import scores


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
    values = scores.clip_metrics(clip, truth, truth, mask, dilate=6)  # SSIM looks 5 pixels around
    assert values["edited_psnr"] == scores.PSNR_CAP == 100  # as pages of results say it
    assert values["gain"] == pytest.approx(scores.PSNR_CAP - values["source_psnr"])
    assert values["edited_ssim"] == pytest.approx(1.0, abs=1e-5)
    assert values["background_psnr"] == scores.PSNR_CAP
    assert values["background_ssim"] == pytest.approx(1.0, abs=1e-5)
    assert values["temporal_inside"] == values["temporal_outside"] == 0.0


def test_unedited_source_gains_nothing(clip: np.ndarray) -> None:
    mask = box()
    truth = clip.copy()
    truth[mask] = 255 - truth[mask]
    values = scores.clip_metrics(clip, clip, truth, mask, dilate=2)
    assert values["gain"] == 0.0
    assert values["background_psnr"] == scores.PSNR_CAP
    assert values["temporal_inside"] > 10


def test_psnr_counts_the_region_alone() -> None:
    a = torch.zeros(2, 3, 16, 16)
    b = a.clone()
    b[:, :, :4] = 16.0  # mean square error 256 inside, 0 elsewhere
    region = torch.zeros(2, 16, 16, dtype=torch.bool)
    region[:, :4] = True
    assert scores.psnr(a, b, region) == pytest.approx(10 * np.log10(255**2 / 256), abs=1e-3)
    assert scores.psnr(a, b, ~region) == scores.PSNR_CAP


def test_flicker_is_temporal_error_and_a_constant_shift_is_not() -> None:
    still = torch.full((4, 3, 8, 8), 100.0)
    flicker = still.clone()
    flicker[1::2] += 10
    everywhere = torch.ones(4, 8, 8, dtype=torch.bool)
    assert scores.temporal_error(flicker, still, everywhere) == pytest.approx(10.0)
    assert scores.temporal_error(still + 25, still, everywhere) == 0.0


def test_grow_adds_pixels_on_every_side() -> None:
    region = torch.zeros(1, 9, 9, dtype=torch.bool)
    region[0, 4, 4] = True
    assert scores.grow(region, 2).sum() == 25
    assert torch.equal(scores.grow(region, 0), region)


def test_damage_near_the_edit_does_not_count_as_background(clip: np.ndarray) -> None:
    mask = box()
    edit = clip.copy()
    edit[:, 6:8, 8:24] = 0
    near = scores.clip_metrics(clip, edit, clip, mask, dilate=4)
    counted = scores.clip_metrics(clip, edit, clip, mask, dilate=0)
    assert near["background_psnr"] == scores.PSNR_CAP
    assert counted["background_psnr"] < 40


def test_empty_region_leaves_its_metrics_out(clip: np.ndarray) -> None:
    values = scores.clip_metrics(clip, clip, clip, np.zeros(clip.shape[:3], bool), dilate=8)
    assert "gain" not in values
    assert "background_psnr" in values


def test_shapes_that_differ_are_named(clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"edit \(4, 32, 48, 3\)"):
        scores.clip_metrics(clip, clip[:4], clip, box(), dilate=8)


def test_summary_counts_successes_over_clips_that_have_an_edit() -> None:
    clips = [{"gain": 6.0, "recomputed": 1.0}, {"gain": 2.0, "recomputed": 0.5}, {"recomputed": 0}]
    values = scores.summary(clips, success_db=4.0)
    assert values["success"] == 0.5
    assert values["gain"] == 4.0
    assert values["recomputed"] == 0.5


def levels(*clips: int) -> list[np.ndarray]:
    """A flat clip for each level."""
    return [np.full((3, 32, 32, 3), level, np.uint8) for level in clips]


def decibels(square: float) -> float:
    return float(10 * np.log10(255**2 / square))


def test_figures_by_hand_where_source_edit_and_truth_all_differ() -> None:
    source, edit, truth = levels(100, 110, 140)
    mask = np.zeros((3, 32, 32), bool)
    mask[:, 8:20, 4:12] = True
    edit[mask], truth[mask] = 90, 50  # inside: 100, 90, 50; outside: 100, 110, 140
    edit[1:, :, 24:] += 4  # outside alone, after the first frame: flickers by 4 once in two changes
    values = scores.clip_metrics(source, edit, truth, mask, dilate=0)
    assert values["edited_psnr"] == pytest.approx(decibels(40**2), abs=1e-3)
    assert values["source_psnr"] == pytest.approx(decibels(50**2), abs=1e-3)
    assert values["gain"] == pytest.approx(decibels(40**2) - decibels(50**2), abs=1e-3)
    outside = 3 * 32 * 32 - mask.sum()
    moved = 2 * 32 * 8
    to_source = (10**2 * (outside - moved) + 14**2 * moved) / outside
    to_truth = (30**2 * (outside - moved) + 26**2 * moved) / outside
    assert values["background_psnr"] == pytest.approx(decibels(to_source), abs=1e-3)
    assert values["background_psnr_truth"] == pytest.approx(decibels(to_truth), abs=1e-3)
    assert values["temporal_inside"] == 0
    share = 32 * 8 / (32 * 32 - 12 * 8)
    assert values["temporal_outside"] == pytest.approx(4 * share / 2, abs=1e-4)


def test_each_comparison_is_of_the_two_clips_that_it_names() -> None:
    draw = np.random.default_rng(0)
    source, edit, truth = draw.integers(0, 256, (3, 4, 32, 40, 3), dtype=np.uint8)
    mask = np.zeros((4, 32, 40), bool)
    mask[:, 4:20, 6:30] = True
    mask[2] = False  # an edit that is gone for a moment
    s, e, t = (torch.from_numpy(c).permute(0, 3, 1, 2).float() for c in (source, edit, truth))
    inside = torch.from_numpy(mask)
    outside = ~scores.grow(inside, 3)
    values = scores.clip_metrics(source, edit, truth, mask, dilate=3)
    edited = scores.psnr(e, t, inside)
    assert values == {
        "edited_psnr": edited,
        "edited_ssim": scores.ssim(e, t, inside),
        "source_psnr": scores.psnr(s, t, inside),
        "source_ssim": scores.ssim(s, t, inside),
        "gain": edited - scores.psnr(s, t, inside),
        "background_psnr": scores.psnr(e, s, outside),
        "background_ssim": scores.ssim(e, s, outside),
        "background_psnr_truth": scores.psnr(e, t, outside),
        "background_ssim_truth": scores.ssim(e, t, outside),
        "temporal_inside": scores.temporal_error(e, t, inside),
        "temporal_outside": scores.temporal_error(e, s, outside),
    }
    assert len(set(values.values())) == len(values)


def test_the_region_of_a_change_is_that_of_the_later_frame() -> None:
    a = torch.zeros(3, 3, 4, 4)
    a[1, :, 0, 0] = 6.0  # changes by 6 into frame 1 and by -6 into frame 2
    region = torch.zeros(3, 4, 4, dtype=torch.bool)
    region[2, 0, 0] = region[2, 3, 3] = True
    assert scores.temporal_error(a, torch.zeros_like(a), region) == pytest.approx(3.0)
    region[0, 1, 1] = True  # a first frame changes nothing
    assert scores.temporal_error(a, torch.zeros_like(a), region) == pytest.approx(3.0)


def test_ssim_is_the_mean_of_its_map_over_the_region() -> None:
    # Flat patches of levels a and b have SSIM (2ab + c) / (a^2 + b^2 + c), c = (0.01 * 255)^2,
    # 5 and more pixels from where the level changes (its window is 11 wide).
    a = torch.full((2, 3, 40, 40), 100.0)
    b = a.clone()
    b[:, :, :, 20:] = 50.0
    left, right = (torch.zeros(2, 40, 40, dtype=torch.bool) for _ in range(2))
    left[:, :, :14], right[:, :, 26:] = True, True
    c = (0.01 * 255) ** 2
    assert scores.ssim(a, b, left) == pytest.approx(1.0, abs=1e-4)
    wanted = (2 * 5000 + c) / (100**2 + 50**2 + c)
    assert scores.ssim(a, b, right) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("place", [(20, 9), (0, 0), (31, 17), (3, 23)])
def test_ssim_is_that_of_its_definition(place: tuple[int, int]) -> None:
    """Around a pixel, in the middle and at edges, where the picture is mirrored."""
    draw = np.random.default_rng(1)
    a, b = draw.integers(0, 256, (2, 1, 3, 32, 24)).astype(np.float32)
    b = (3 * a + b) / 4
    a[:, :, :8, :8] /= 50  # dark, where the first constant counts
    b[:, :, :8, :8] /= 100
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(window, window) / window.sum() ** 2
    rows, columns = (np.arange(-5, 6) + at for at in place)
    rows = np.where(rows > 31, 62 - rows, rows)
    columns = np.where(columns > 23, 46 - columns, columns)
    around = np.ix_(np.abs(rows), np.abs(columns))
    wanted = []
    for x, y in zip(a[0].astype(float), b[0].astype(float), strict=True):
        x, y = x[around], y[around]
        mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
        variances = (weights * (x - mean_x) ** 2).sum() + (weights * (y - mean_y) ** 2).sum()
        together = (weights * (x - mean_x) * (y - mean_y)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        alike = (2 * mean_x * mean_y + c1) * (2 * together + c2)
        wanted.append(alike / ((mean_x**2 + mean_y**2 + c1) * (variances + c2)))
    found = scores.ssim_map(torch.from_numpy(a), torch.from_numpy(b))[0, :, *place]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("grey", "same"), [(0, True), (1, False)])
def test_identical_pixels_are_capped_and_near_ones_are_not(grey: int, same: bool) -> None:
    a = torch.full((1, 3, 8, 8), 10.0)
    everywhere = torch.ones(1, 8, 8, dtype=torch.bool)
    found = scores.psnr(a, a + grey, everywhere)
    assert found == (scores.PSNR_CAP if same else pytest.approx(decibels(1), abs=1e-3))


def test_a_region_that_is_left_out_is_that_one_alone() -> None:
    draw = np.random.default_rng(0)
    source, edit, truth = draw.integers(0, 256, (3, 3, 16, 16, 3), dtype=np.uint8)
    first = np.zeros((3, 16, 16), bool)
    first[0, :8] = True  # an edit in the first frame only has no change to measure
    assert "temporal_inside" not in scores.clip_metrics(source, edit, truth, first, dilate=0)
    assert "gain" in scores.clip_metrics(source, edit, truth, first, dilate=0)
    values = scores.clip_metrics(source, edit, truth, np.ones((3, 16, 16), bool), dilate=0)
    assert "gain" in values
    assert "temporal_inside" in values
    assert not [name for name in values if "background" in name or "outside" in name]
    rest = np.ones((3, 16, 16), bool)
    rest[0, 0, 0] = False  # background in the first frame only
    values = scores.clip_metrics(source, edit, truth, rest, dilate=0)
    assert "background_psnr" in values
    assert "temporal_outside" not in values
    first[:] = first[0]  # of two frames there is one change to measure, on either side
    values = scores.clip_metrics(source[:2], edit[:2], truth[:2], first[:2], dilate=0)
    assert {"temporal_inside", "temporal_outside"} <= values.keys()


@pytest.mark.parametrize("name", ["source", "edit", "truth", "mask"])
def test_each_clip_s_shape_is_compared(name: str) -> None:
    clips = {n: np.zeros((2, 16, 16, 3), np.uint8) for n in ("source", "edit", "truth")}
    clips["mask"] = np.zeros((2, 16, 16), bool)
    clips[name] = clips[name][:1]
    with pytest.raises(ValueError, match=f"one shape, got .*{name} \\(1, 16"):
        scores.clip_metrics(**clips, dilate=0)


@pytest.mark.parametrize(("gain", "success"), [(3.99, 0.0), (4.0, 1.0), (4.01, 1.0)])
def test_a_gain_at_the_goal_is_a_success(gain: float, success: float) -> None:
    assert scores.summary([{"gain": gain}], success_db=4.0) == {"gain": gain, "success": success}
    assert "success" not in scores.summary([{"background_psnr": gain}], success_db=4.0)
