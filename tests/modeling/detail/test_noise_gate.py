"""What counts as an edit and what as noise, on pictures where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.detail.noise_gate import BELOW, REACH, RISE, WHOLE, _gated, only_edited
from modeling.detail.transfer import transfer
from tests.modeling.detail.test_resample import noise
from tests.modeling.detail.test_transfer import picture

HEIGHT, WIDTH = 40, 60
THING = (slice(None), slice(8, 24), slice(10, 30))


def off_by(seen: Tensor, levels: Tensor | int) -> Tensor:
    return (seen.int() + levels).clamp(0, 255).to(torch.uint8)


def errors(seed: int, most: int) -> Tensor:
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.integers(-most, most + 1, (1, HEIGHT, WIDTH, 3)))


@pytest.mark.parametrize("error", [errors(0, 11), errors(1, 3) + 4, errors(2, 3) - 4])
def test_noise_and_a_slight_shift_of_tone_give_the_source(error: Tensor) -> None:
    seen = picture(HEIGHT, WIDTH)
    source = noise(80, 120)
    assert torch.equal(only_edited(seen, off_by(seen, error)), seen)
    assert torch.equal(transfer(source, seen, only_edited(seen, off_by(seen, error))), source)


@pytest.mark.parametrize("pattern", ["flat", "stripes"])
def test_an_edit_stays_whole_and_what_is_around_it_is_the_source(pattern: str) -> None:
    """Stripes brighter and darker in turn: their mean is the source's."""
    seen = picture(HEIGHT, WIDTH)
    edit = off_by(seen, errors(0, 8))
    change = torch.full((HEIGHT, WIDTH, 1), -60)
    if pattern == "stripes":
        change[:, ::2] = 60
    edit[THING] = off_by(seen, change)[THING]
    found = only_edited(seen, edit)
    assert torch.equal(found[THING], edit[THING])
    beside = torch.ones_like(found, dtype=torch.bool)
    beside[:, 8 - REACH : 24 + REACH, 10 - REACH : 30 + REACH] = False
    assert torch.equal(found[beside], seen[beside])


def test_one_colour_that_moves_is_enough() -> None:
    seen = torch.full((1, HEIGHT, WIDTH, 3), 100, dtype=torch.uint8)
    edit = seen.clone()
    edit[(*THING, slice(2, 3))] = 160
    assert torch.equal(only_edited(seen, edit)[THING], edit[THING])


def test_nothing_jumps_between_noise_and_edit() -> None:
    """A shift a level stronger shows at most a few levels more, on the way to all of it."""
    seen = torch.full((1, HEIGHT, WIDTH, 3), 100, dtype=torch.uint8)
    shown = []
    for level in range(18):
        edit = seen.clone()
        edit[THING] += level
        shown.append(int(only_edited(seen, edit)[0, 16, 20, 0]) - 100)
    # Of level 9 to 15 an eighth to seven: 1.1, 2.5, 4.1, 6, 8.1, 10.5 and 13.1.
    assert shown == [0] * 9 + [1, 3, 4, 6, 8, 11, 13, 16, 17]


@pytest.mark.parametrize(("rows", "kept"), [(36, True), (16, False)])
def test_where_most_is_edited_a_faint_part_is_edited_too(rows: int, kept: bool) -> None:
    seen = torch.full((1, HEIGHT, WIDTH, 3), 100, dtype=torch.uint8)
    edit = seen + 5
    edit[:, :rows] = 160
    corner = only_edited(seen, edit)[0, -1, -1]
    assert (corner == (105 if kept else 100)).all()


def test_it_is_the_formula_and_frames_are_on_their_own() -> None:
    seen = noise(9, 12, 3, seed=1)
    edit = off_by(seen, noise(9, 12, 3, seed=2).int() // torch.tensor([6, 3, 10]).view(3, 1, 1, 1))
    s, e = seen.numpy().astype(int), edit.numpy().astype(int)
    around = ((0, 0), (REACH, REACH), (REACH, REACH), (0, 0))
    size = np.pad(np.abs(e - s), around, mode="edge")
    wanted = np.empty_like(s)
    for n in range(3):
        means = np.array([
            [size[n, y : y + 7, x : x + 7].mean(axis=(0, 1)).max() for x in range(12)]
            for y in range(9)
        ])  # fmt: skip
        share = np.floor(((means - BELOW) / RISE).clip(0, 1) * WHOLE + 1e-9)
        strict = min(WHOLE, 2 * (WHOLE - int(share.mean())))
        below, rise = (BELOW * 49 * strict) >> 6, max((RISE * 49 * strict) >> 6, 1)
        share = np.floor((means * 49 - below) / rise * WHOLE + 1e-9).clip(0, WHOLE)
        wanted[n] = s[n] + np.floor(((e - s)[n] * share[..., None] + WHOLE / 2) / WHOLE)
    found = only_edited(seen, edit)
    assert np.array_equal(found.numpy(), wanted)
    assert torch.equal(found, _gated(seen, edit))  # all at once, as on a GPU
