"""What conv.cu is given; what it makes of it is for a GPU (`test_accelerate`)."""

from __future__ import annotations

import pytest
import torch

from modeling.gpu.conv import _ordered


@pytest.mark.parametrize(("outputs", "columns"), [(96, 96), (3, 8)])
def test_weights_lie_in_the_order_in_which_the_kernel_reads_them(
    outputs: int, columns: int
) -> None:
    weight = torch.randn(outputs, 32, 3, 3, 3)
    found = _ordered(weight, columns)
    assert found.is_contiguous()
    assert found.shape == (3, 2, 9, 2, columns, 8)
    for output, channel, frame, row, column in torch.cartesian_prod(
        torch.tensor([0, 1, outputs - 1]), torch.arange(32), *3 * [torch.arange(3)]
    ).tolist():
        part, rest = divmod(channel, 16)
        half, place = divmod(rest, 8)
        value = found[frame, part, 3 * row + column, half, output, place]
        assert value == weight[output, channel, frame, row, column]
    assert not found[..., outputs:, :].any()
