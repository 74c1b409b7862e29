from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling.detail.resample import Kernel, resize, resize_by_taps

SIDES = st.integers(1, 90)


def noise(height: int, width: int, count: int = 1, seed: int = 0) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.integers(0, 256, (count, height, width, 3), np.uint8))


@given(before=st.tuples(SIDES, SIDES), after=st.tuples(SIDES, SIDES), cubic=st.booleans())
@settings(max_examples=60, deadline=None)
def test_both_ways_agree_to_the_bit_and_with_pillow(
    before: tuple[int, int], after: tuple[int, int], cubic: bool
) -> None:
    frames = noise(*before, count=2)
    kernel: Kernel = "bicubic" if cubic else "bilinear"
    fast, plain = resize(frames, *after, kernel), resize_by_taps(frames, *after, kernel)
    assert fast.dtype == plain.dtype == torch.uint8
    assert torch.equal(fast, plain)
    method = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    # One side alone: Pillow may take them in the other order, and where a cubic overshoots it cuts.
    for height, width in ((after[0], before[1]), (before[0], after[1])):
        ours = resize_by_taps(frames[:1], height, width, kernel)[0].numpy()
        theirs = np.asarray(Image.fromarray(frames[0].numpy()).resize((width, height), method))
        # Pillow keeps 22 bits of a weight where PyTorch keeps 16.
        assert np.abs(theirs.astype(int) - ours).max() <= 1


@pytest.mark.parametrize("height", [48, 20])
def test_a_side_that_stays_is_left_alone(height: int) -> None:
    frames = noise(48, 64)
    assert resize(frames, 48, 64) is frames
    assert torch.equal(resize_by_taps(frames, 48, 64), frames)
    row = frames[:, 10:11].expand(-1, 48, -1, -1).contiguous()
    assert torch.equal(resize_by_taps(row, height, 64), row[:, :height])
