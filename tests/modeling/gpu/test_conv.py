"""What conv.cu is given; what it makes of it is for a GPU (`test_accelerate`)."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling.gpu import conv
from modeling.gpu.conv import CausalConvolution, _ordered

# Inputs, outputs, and columns of the matrix that holds the weights.
CHANNELS = [(96, 96, 96), (96, 192, 192), (192, 192, 192), (96, 3, 8)]


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


def constants(**given: int) -> dict[str, int]:
    """Those of conv.cu, for what it is compiled with."""
    for line in re.findall(r"^constexpr int (.*);", conv._SOURCE.read_text(), re.MULTILINE):
        for said in line.split(", "):
            name, value = said.split(" = ")
            given[name] = eval(value.replace("/", "//"), {}, given)
    return given


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled and launched, without a GPU."""
    told: list[Any] = []

    def compiled(*about: Any) -> Any:
        told.append(about)
        return told.append

    monkeypatch.setattr(conv, "_compiled", compiled)
    return told


def causal(inputs: int, outputs: int) -> tuple[CausalConvolution, Tensor]:
    layer = nn.Conv3d(inputs, outputs, 3, dtype=torch.bfloat16)
    return CausalConvolution(layer), layer.weight.detach()


@pytest.mark.parametrize(("inputs", "outputs", "columns"), CHANNELS)
def test_memory_threads_and_tiles_are_those_of_the_kernel(
    launched: list[Any], inputs: int, outputs: int, columns: int
) -> None:
    made, weight = causal(inputs, outputs)
    ((kind, channels, compiled_columns, blocks),) = launched
    assert (kind, channels, compiled_columns) == ("bf16", inputs, columns)
    assert torch.equal(made._weights, _ordered(weight, columns))
    steps, memory = conv._steps(columns, blocks)
    known = constants(CIN=inputs, COUT=columns, BLOCKS=blocks)
    threads = known["MULTIPLIERS"] + known["BRINGERS"]
    staged = known["MULTIPLIERS"] // 32 * 8 * known["STAGED_BYTES"]  # eight pixels of every warp
    assert (threads, known["TILE_H"]) == (conv._THREADS, conv._TILE_HEIGHT)
    assert memory == steps * known["STAGE_BYTES"] + staged
    assert memory + 2 * 8 * steps <= 227 << 10 < memory + known["STAGE_BYTES"]
    assert blocks * columns // 2 <= 192  # sums of a thread, which has 255 registers for all

    high, wide = known["TILE_H"], known["TILE_W"]
    x = torch.zeros(2, 4, 2 * high + 1, wide + 1, inputs, dtype=torch.bfloat16)
    past = torch.zeros(2, 2, *x.shape[2:], dtype=torch.bfloat16)
    for before in (past, None):
        y = made(x, before)
        told = launched.pop()
        assert y.shape == (*x.shape[:4], outputs)
        assert (y.permute(0, 1, 4, 2, 3) if outputs == 3 else y).is_contiguous()
        assert (told.x, told.y) == (x.data_ptr(), y.data_ptr())
        assert told.past == (None if before is None else past.data_ptr())
        assert told.weights == made._weights.data_ptr()
        assert (told.clips, told.frames, told.height, told.width) == x.shape[:4]
        assert (told.tiles, told.across) == (2 * 4 * 3 * 2, 2)


def test_what_the_kernel_would_misread_is_refused(launched: list[Any]) -> None:
    made, _ = causal(96, 96)
    x = torch.zeros(1, 2, 4, 4, 96, dtype=torch.bfloat16)
    turned = x.transpose(2, 3)
    for wrong in ((turned, None), (x, turned), (x.half(), None)):
        with pytest.raises(AssertionError):
            made(*wrong)
    made(x, x)
    assert len(launched) == 2


def test_what_compiles_it_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeError, match=r"conv\.cu is compiled .* pip install cuda-bindings"):
        conv._compiled("bf16", 96, 96, 4)
