"""The guide that is no decoding: the blur against its formula, and what stays of an edit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modeling.detail.guide import BELOW, BITS, RISE, blurred, following, gaussian
from modeling.detail.noise_gate import REACH, WINDOW
from modeling.detail.resample import resize
from modeling.detail.transfer import ONE, ZERO, gains, transfer
from tests.modeling.detail.test_resample import noise
from tests.modeling.detail.test_transfer import picture, psnr


@pytest.mark.parametrize("pixels", [0.0, 0.2, 0.5, 0.8, 1.0, 1.5])
def test_the_weights_are_a_gaussian(pixels: float) -> None:
    weights = gaussian(pixels)
    assert 2 * sum(weights) - weights[0] == 1 << BITS
    assert min(weights) > 0
    assert len(weights) > 2 * pixels
    for x, weight in enumerate(weights[1:], 1):
        wanted = np.exp(-((x / pixels) ** 2) / 2)
        assert weight / weights[0] == pytest.approx(wanted, abs=1.5 / weights[0])


@pytest.mark.parametrize(
    ("pixels", "weights"),
    [
        (0.1, [128]), (0.3, [128]), (0.35, [124, 2]), (0.5, [100, 14]), (1.0, [50, 31, 7, 1]),
        (1.2, [42, 30, 11, 2]),
    ],
)  # fmt: skip
def test_the_weights_end_where_they_are_nothing(pixels: float, weights: list[int]) -> None:
    """Of 1.0: 128 * exp(-x^2 / 2) / 2.506, up to two and a half deviations, which is three."""
    assert gaussian(pixels) == weights


@pytest.mark.parametrize("size", [(40, 50), (1, 1), (2, 30)])
def test_the_blur_is_the_weights_along_both_sides(size: tuple[int, int]) -> None:
    frames, (middle, *outer) = noise(*size, 2), gaussian(1.0)
    row = torch.tensor([*reversed(outer), middle, *outer]) / (1 << BITS)
    reach = len(outer)
    around = F.pad(frames.permute(0, 3, 1, 2).float(), (reach,) * 4, mode="replicate")
    wanted = F.conv2d(around, (row[:, None] * row).expand(3, 1, -1, -1), groups=3)
    off = (blurred(frames, 1.0).permute(0, 3, 1, 2) - wanted).abs()
    assert off.max() <= 1.01  # rows are rounded before columns
    assert torch.equal(blurred(frames, 0.0), frames)


def test_white_stays_white() -> None:
    """The largest sums that 16 bits must hold."""
    white = torch.full((1, 9, 9, 3), 255, dtype=torch.uint8)
    assert torch.equal(blurred(white, 1.5), white)


def by_loops(seen: Tensor, edit: Tensor) -> Tensor:
    """`following` of one frame in doubles, but for the slopes, whose own test has them."""
    slope = (gains(seen, edit)[0].numpy().astype(float) - ZERO) / ONE
    around = ((REACH, REACH), (REACH, REACH), (0, 0))
    s, e = (np.pad(x[0].numpy().astype(float), around, mode="edge") for x in (seen, edit))
    height, width = seen.shape[1:3]
    line = np.empty((height, width, 3))
    span = 2 * REACH + 1
    for y, x in np.ndindex(height, width):
        window = (slice(y, y + span), slice(x, x + span))
        middle = s[y + REACH, x + REACH] - s[window].mean(axis=(0, 1))
        line[y, x] = e[window].mean(axis=(0, 1)) + slope[y, x] * middle
    line = np.floor(line + 0.5).clip(0, 255)
    rest = edit[0].numpy() - line
    sizes = np.pad(np.abs(rest), around, mode="edge")
    out = np.empty_like(line)
    for y, x in np.ndindex(height, width):
        mean = sizes[y : y + span, x : x + span].sum(axis=(0, 1)).max() / WINDOW
        share = np.floor(64 * (mean - BELOW) / RISE + 1e-9).clip(0, 64) / 64
        out[y, x] = line[y, x] + np.floor(rest[y, x] * share + 0.5)
    return torch.from_numpy(out.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("levels", "halves", "more"), [(6, 1, 50), (20, 1, 50), (60, 1, 50), (20, 4, 0), (20, 4, -260)]
)
def test_it_is_the_formula(levels: int, halves: int, more: int) -> None:
    """With nothing new in the edit, something, and nothing else; of tones that leave what a pixel
    holds on either side, too."""
    seen = picture(20, 24)
    new = (noise(20, 24, seed=3).int() - 128) * levels // 128
    edit = (seen.int() * halves // 2 + more + new).clamp(0, 255).to(torch.uint8)
    assert torch.equal(following(seen, edit)[0], by_loops(seen, edit))


def test_a_vaes_errors_are_up_to_six_levels_and_from_fourteen_on_all_is_new() -> None:
    """A chessboard around one tone, which no linear function of an even picture explains."""
    seen, shown = torch.full((1, 16, 16, 3), 100, dtype=torch.uint8), []
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2 - 1
    for level in range(17):
        edit = (120 + level * board)[None, :, :, None].expand(-1, -1, -1, 3).to(torch.uint8)
        shown.append(int(following(seen, edit)[0, 8, 9, 0]) - 120)
    # Of level 7 to 13 an eighth to seven: 0.9, 2, 3.4, 5, 6.9, 9 and 11.4.
    assert shown == [0] * 7 + [1, 2, 3, 5, 7, 9, 11, 14, 15, 16]


def test_where_nothing_changes_nothing_does() -> None:
    seen = noise(30, 41, 2)
    assert torch.equal(following(seen, seen), seen)


def test_a_tone_loses_the_vaes_errors_and_what_is_new_stays() -> None:
    source = picture(120, 208)
    truth = (source.int() * 3 // 5 + 40).to(torch.uint8)
    seen = blurred(resize(source, 60, 104), 0.5)
    errors = torch.from_numpy(np.random.default_rng(1).normal(0, 4, seen.shape)).round()
    edit = (blurred(resize(truth, 60, 104), 0.5) + errors).clamp(0, 255).to(torch.uint8)
    ways = (transfer(source, seen, x) for x in (edit, following(seen, edit)))
    without, with_it = (psnr(way, truth) for way in ways)
    assert with_it > without + 5
    edit[:, 20:40, 20:40] = noise(20, 20, seed=5)  # no function of the source
    assert torch.equal(following(seen, edit)[:, 24:36, 24:36], edit[:, 24:36, 24:36])
