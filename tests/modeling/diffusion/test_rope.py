"""Rotary positions against the formula, worked out token by token."""

from __future__ import annotations

import pytest
import torch

from modeling.diffusion.rope import fixed_rope_table, rope_table, rotate, time_shift

TIMES, HEIGHT, WIDTH = (0, 7, 1000), 2, 3


@pytest.mark.parametrize("head_dim", [12, 20, 128])
def test_angles_by_hand(head_dim: int) -> None:
    """Each axis has dimensions of its own, whose frequencies fall from 1 to almost 1 / 10000."""
    space = head_dim // 2 // 3
    sizes = (head_dim // 2 - 2 * space, space, space)
    rope = rope_table(torch.tensor(TIMES), HEIGHT, WIDTH, head_dim)
    places = [(t, y, x) for t in TIMES for y in range(HEIGHT) for x in range(WIDTH)]
    angles = torch.tensor(
        [
            [
                at / 10000 ** (n / size)
                for at, size in zip(place, sizes, strict=True)
                for n in range(size)
            ]
            for place in places
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(rope.cos, angles.cos().float())
    torch.testing.assert_close(rope.sin, angles.sin().float())


def test_a_shift_in_time_is_a_later_place() -> None:
    x = torch.randn(1, HEIGHT * WIDTH, 2, 20, generator=torch.manual_seed(0))
    now, later = (rope_table(torch.tensor([t]), HEIGHT, WIDTH, 20) for t in (4, 4 + 9))
    moved = rotate(rotate(x, now), time_shift(9, 20, x.device))
    torch.testing.assert_close(moved, rotate(x, later))


def test_what_is_kept_of_a_forward_without_gradients_serves_one_with_them() -> None:
    """Who edits in inference mode may train in the same process, at the same size."""
    asked = ((3, 1, 4), 5, 7, 20, torch.device("cpu"))  # by no other test
    with torch.inference_mode():
        first = fixed_rope_table(*asked)
    rope = fixed_rope_table(*asked)
    assert rope is first
    x = torch.ones(1, 3 * 5 * 7, 2, 20, requires_grad=True)
    rotate(x, rope).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        rope_table(torch.tensor([1]), 5, 8, 20)
    x = torch.ones(1, 5 * 8, 2, 20, requires_grad=True)
    rotate(x, rope_table(torch.tensor([2]), 5, 8, 20)).sum().backward()
    assert x.grad is not None
