from __future__ import annotations

import torch

from modeling.pixels import from_uint8, to_uint8


def test_every_level_comes_back_and_what_lies_between_goes_to_the_nearer() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = from_uint8(levels)
    assert pixels[[0, 255]].tolist() == [-1, 1]
    for off in (-0.49, 0.0, 0.49):
        assert torch.equal(to_uint8(pixels + off / 127.5), levels)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]
