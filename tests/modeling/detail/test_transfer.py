"""The transfer's rule, each part against what it is for, and the plain form against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling.detail.resample import resize
from modeling.detail.transfer import FLAT, ONE, REACH, ZERO, gains, transfer, transfer_by_taps
from tests.modeling.detail.test_resample import noise


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth colours, edges, and fine grain: uint8 [1, height, width, 3]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / height
    light = 120 + 60 * np.sin(5 * x + 3 * y) + 25 * (np.hypot(x - 0.6, y - 0.5) < 0.3)
    grain = draw.normal(0, 12, (height, width))
    colours = np.stack([light + grain, 0.9 * light + grain, 0.8 * light - grain], axis=-1)
    return torch.from_numpy(colours.round().clip(0, 255).astype(np.uint8))[None]


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


@given(
    large=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    small=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_both_ways_agree_to_the_bit_on_noise(
    large: tuple[int, int], small: tuple[int, int], seed: int
) -> None:
    source, seen, edit = noise(*large, 2, seed), noise(*small, 2, seed + 1), noise(*small, 2, seed)
    fast = transfer(source, seen, edit)
    assert fast.shape == source.shape
    assert fast.dtype == torch.uint8
    assert torch.equal(fast, transfer_by_taps(source, seen, edit))


@given(
    large=st.tuples(st.integers(1, 90), st.integers(1, 40)),
    small=st.tuples(st.integers(1, 90), st.integers(1, 40)),
    rows=st.tuples(st.integers(0, 89), st.integers(1, 6)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_only_rows_that_the_edit_reaches_are_worked_on(
    large: tuple[int, int], small: tuple[int, int], rows: tuple[int, int], seed: int
) -> None:
    """Of three frames one is edited in one colour of a few pixels, one nowhere, one everywhere: the
    plain form, which looks at all rows of each, gives the same bits."""
    source, seen, other = noise(*large, 3, seed), noise(*small, 3, seed + 1), noise(*small, 3, seed)
    edit = seen.clone()
    first = rows[0] % small[0]
    few = (0, slice(first, first + rows[1]), seed % small[1], seed % 3)
    edit[few] = other[few]
    edit[2] = other[2]
    out = transfer(source, seen, edit)
    assert torch.equal(out, transfer_by_taps(source, seen, edit))
    assert torch.equal(out[1], source[1])


@pytest.mark.parametrize("twice", [0, 1, 2, 3, 8, -1, -3, -8])
def test_gains_are_slopes_of_windows(twice: int) -> None:
    """Of an edit that has half as much of the source's contrast as `twice` says, and something of
    its own: to both ends of what a byte holds."""
    s, own = noise(12, 9, seed=1) // 4 + 100, noise(12, 9, seed=2).int() // 16
    e = (120 + twice * (s.int() - 132) // 2 + own).clamp(0, 255).to(torch.uint8)
    found = gains(s, e)
    around = ((0, 0), (REACH, REACH), (REACH, REACH), (0, 0))
    s64, e64 = (np.pad(x.numpy().astype(np.float64), around, mode="edge") for x in (s, e))
    slopes = np.empty((13, 10, 3))  # at the corners of pixels
    for y, x, c in np.ndindex(slopes.shape):
        window = (0, slice(y, y + 2 * REACH), slice(x, x + 2 * REACH), c)
        of_s, of_e = s64[window], e64[window]
        covariance = ((of_s - of_s.mean()) * (of_e - of_e.mean())).mean()
        slopes[y, x, c] = (covariance + FLAT) / (of_s.var() + FLAT)
    slopes = np.floor(ONE * slopes + 0.5).clip(-ZERO, 255 - ZERO) + ZERO
    wanted = sum(slopes[y : y + 12, x : x + 9] for y in range(2) for x in range(2)) / 4
    assert np.array_equal(found[0].numpy(), np.floor(wanted + 0.5))
    middle = float(found.float().mean() - ZERO) / ONE
    assert middle == pytest.approx(min(max(twice / 2, -2.0), 255 / ONE - 2), abs=0.1)


def test_a_window_as_flat_as_noise_keeps_its_detail() -> None:
    """Stripes of one level around their mean, and an edit without any: (0 + 2) / (1 + 2) of it."""
    seen = torch.full((1, 12, 24, 3), 100, dtype=torch.uint8)
    seen[:, :, ::2] = 102
    found = gains(seen, torch.full_like(seen, 120))
    assert (found[:, :, 4:-4] == 128 + 43).all()


@pytest.mark.parametrize("small", [(60, 104), (30, 53), (240, 416), (120, 208)])
def test_where_nothing_changes_the_source_comes_out_to_the_bit(small: tuple[int, int]) -> None:
    source = picture(120, 208)
    seen = noise(*small)  # whatever the VAE makes of it
    assert torch.equal(transfer(source, seen, seen), source)


@pytest.mark.parametrize(("tone", "least"), [((0.5, 40), 45.0), ((1.4, -30), 40.0)])
def test_a_change_of_tone_keeps_the_detail(tone: tuple[float, float], least: float) -> None:
    source = picture(120, 208)
    truth = (source * tone[0] + tone[1]).round().clamp(0, 255).to(torch.uint8)
    seen, edit = resize(source, 60, 104), resize(truth, 60, 104)
    assert psnr(transfer(source, seen, edit), truth) > least
    assert psnr(resize(edit, 120, 208), truth) < least - 10


def test_a_negative_turns_the_detail_round() -> None:
    source = picture(120, 208)
    seen = resize(source, 60, 104)
    assert psnr(transfer(source, seen, 255 - seen), 255 - source) > 45


def test_what_is_new_shows_no_ghost_of_the_source() -> None:
    source = picture(120, 208)
    seen = resize(source, 60, 104)
    edit = seen.clone()
    edit[:, 15:45, 30:70] = torch.tensor([200, 30, 30], dtype=torch.uint8)
    out = transfer(source, seen, edit)
    inside = out[:, 38:82, 68:132].float()  # a window and the kernels away from the border
    ghost = (inside - torch.tensor([200.0, 30.0, 30.0])).abs()
    assert ghost.mean() < 0.6  # of the source's grain, which is 10 levels
    assert ghost.max() <= 6
    assert torch.equal(out[:, :10], source[:, :10])


def test_large_gains_and_levels_stay_in_their_range() -> None:
    """Black beside white, steeper than any gain: whole numbers of 16 bits must not turn over."""
    source = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    source[:, :, ::2] = 255
    seen = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
    seen[:, ::3] = 110
    edit = torch.where(seen > 105, 255, 0).to(torch.uint8)
    out = transfer(source, seen, edit)
    # The gain is almost 2: a white column becomes white, a black one black.
    assert out[:, :, ::2].min() == 255
    assert out[:, 6:-6, 1::2].float().mean() < 60
    out = transfer(source, seen, 255 - edit)
    assert out[:, 6:-6, ::2].float().mean() < 60


def test_it_is_the_formula() -> None:
    source, seen, edit = picture(50, 70), picture(25, 33, 1), noise(25, 33)
    large = {"seen": resize(seen, 50, 70), "edit": resize(edit, 50, 70)}
    gain = (resize(gains(seen, edit), 50, 70, "bilinear").double() - ZERO) / ONE
    exact = large["edit"] + gain * (source.double() - large["seen"])
    wanted = (exact + 0.5).floor().clamp(0, 255)
    assert torch.equal(transfer(source, seen, edit).double(), wanted)
