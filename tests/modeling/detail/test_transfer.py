"""The transfer's rule, each part against what it is for, and the plain form against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling.detail.resample import resize
from modeling.detail.transfer import (
    ALL,
    FLAT,
    ONE,
    REACH,
    ZERO,
    means,
    slopes_and_caps,
    transfer,
    transfer_by_taps,
)
from tests.modeling.detail.test_resample import noise


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth colours, edges, and fine grain: uint8 [1, height, width, 3]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / height
    light = 120 + 60 * np.sin(5 * x + 3 * y) + 25 * (np.hypot(x - 0.6, y - 0.5) < 0.3)
    grain = draw.normal(0, 12, (height, width))
    colours = np.stack([light + grain, 0.9 * light + grain, 0.8 * light - grain], axis=-1)
    return torch.from_numpy(colours.round().clip(0, 255).astype(np.uint8))[None]


def faded(frames: Tensor) -> Tensor:
    """A quarter of the colour, so that the cap works."""
    return (frames // 4 + frames[..., 1:2] // 4 * 3).contiguous()


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
    source, seen = noise(*large, 2, seed), noise(*small, 2, seed + 1)
    for edit in (noise(*small, 2, seed), faded(seen)):
        fast = transfer(source, seen, edit)
        assert fast.shape == source.shape
        assert fast.dtype == torch.uint8
        assert torch.equal(fast, transfer_by_taps(source, seen, edit))


def test_slopes_and_caps_of_windows() -> None:
    s = noise(12, 9, seed=1)
    e = faded(s) // 2 + noise(12, 9, seed=2) // 4
    found_slopes, found_caps = slopes_and_caps(s, e)
    around = ((0, 0), (REACH, REACH), (REACH, REACH), (0, 0))
    s64, e64 = (np.pad(x.numpy().astype(np.float64), around, mode="edge") for x in (s, e))
    slopes, caps = np.empty((12, 9, 3)), np.empty((12, 9))
    for y, x in np.ndindex(caps.shape):
        window = (0, slice(y, y + 2 * REACH + 1), slice(x, x + 2 * REACH + 1))
        of_s, of_e = (z[window].reshape(-1, 3) for z in (s64, e64))
        covariance = ((of_s - of_s.mean(0)) * (of_e - of_e.mean(0))).mean(0)
        slope = np.floor(ONE * (covariance + FLAT) / (of_s.var(0) + FLAT) + 0.5)
        slopes[y, x] = slope.clip(-ZERO, 255 - ZERO)
        said = of_s * slopes[y, x] / ONE
        found, wanted = (sum((z[:, c] - z[:, 1]).var() for c in (0, 2)) for z in (of_e, said))
        caps[y, x] = min(ALL, np.floor(ALL * (found / wanted) ** 0.5 + 0.5))
    assert np.array_equal(found_slopes[0].numpy(), slopes + ZERO)
    assert np.array_equal(found_caps[0].numpy(), caps[..., None].repeat(3, axis=-1))
    assert caps.min() < ALL


def test_means_are_rounded_and_go_on_beyond_the_border() -> None:
    x = noise(12, 9, seed=1)
    around = np.pad(x[0].numpy().astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    wanted = sum(around[v : v + 12, u : u + 9] for v in range(3) for u in range(3)) / 9
    assert np.array_equal(means(x)[0].numpy(), wanted.round())


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


def grain(height: int, width: int) -> Tensor:
    """`picture` with as much grain of each colour's own."""
    own = np.random.default_rng(1).normal(0, 12, (1, height, width, 3)).round()
    return (picture(height, width).double() + torch.from_numpy(own)).clamp(0, 255).to(torch.uint8)


def test_a_grey_edit_of_a_colourful_texture_shows_no_specks_of_colour() -> None:
    source = grain(120, 208)
    seen = resize(source, 60, 104)
    weights = torch.tensor([0.299, 0.587, 0.114])
    edit = (seen * weights).sum(-1, keepdim=True).round().to(torch.uint8).expand_as(seen)
    out = transfer(source, seen, edit.contiguous()).int()
    assert (out.amax(-1) - out.amin(-1)).max() <= 1
    truth = (source * weights).sum(-1)
    # The grain of the brightness stays: nearer to the truth than the enlarged edit.
    assert psnr(out[..., 1], truth) > psnr(resize(edit, 120, 208)[..., 1], truth) + 5


def test_an_edit_as_colourful_as_the_source_is_not_capped() -> None:
    seen = grain(60, 104)
    assert slopes_and_caps(seen, 255 - seen)[1].min() == ALL
    warm = (seen * torch.tensor([1.2, 1.0, 0.8])).round().clamp(0, 255).to(torch.uint8)
    assert slopes_and_caps(seen, warm)[1].double().mean() > ALL - 0.5


def test_it_is_the_formula() -> None:
    source, seen = noise(50, 70), noise(25, 33, seed=1)
    edit = faded(seen)
    slopes, caps = slopes_and_caps(seen, edit)
    gain, cap = (resize(means(x), 50, 70, "bilinear").double() for x in (slopes, caps))
    missing = source.double() - resize(seen, 50, 70)
    detail = ((gain - ZERO) / ONE * missing + 0.5).floor()
    grey = (detail.sum(-1, keepdim=True) * 21 / 64 + 0.5).floor()
    detail += ((grey - detail) * (1 - cap / ALL) + 0.5).floor()
    wanted = (resize(edit, 50, 70) + detail).clamp(0, 255)
    assert torch.equal(transfer(source, seen, edit).double(), wanted)
    assert cap.min() < ALL
