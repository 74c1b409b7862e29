"""The GPU's transfer of detail, to the bit; without a GPU in Triton's interpreter, tiny."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from modeling.detail.guide import following
from modeling.detail.resample import Kernel, resize
from modeling.detail.transfer import gains, transfer
from tests.modeling.detail.test_resample import noise

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
CUDA = torch.cuda.is_available()
# In the interpreter a row of pixels takes a third of a second: as few as have borders and a middle,
# and a line that is longer than a block of the kernels.
SIZES = [((5, 9), (3, 5)), ((3, 8), (4, 9)), ((2, 171), (2, 19))]
SIZES += [((480, 832), (240, 416)), ((721, 1279), (352, 640))] if CUDA else []


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    import modeling.gpu.kernels.guide
    import modeling.gpu.kernels.resize
    import modeling.gpu.kernels.transfer

    return modeling.gpu.kernels


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("large", "small"), SIZES)
def test_resize(
    fused: ModuleType, large: tuple[int, int], small: tuple[int, int], kernel: Kernel
) -> None:
    for before, after in ((large, small), (small, large)):
        frames = noise(*before)
        there = frames.cuda() if CUDA else frames
        wanted = resize(frames, *after, kernel)
        assert torch.equal(fused.resize.resize(there, *after, kernel).cpu(), wanted)
    assert fused.resize.resize(there, *before, kernel) is there


@pytest.mark.parametrize(("large", "small"), SIZES)
def test_transfer(fused: ModuleType, large: tuple[int, int], small: tuple[int, int]) -> None:
    count = 2 if CUDA or (large, small) == SIZES[0] else 1  # the interpreter takes seconds a frame
    source, seen = noise(*large, count), noise(*small, count, seed=1)
    edit = (seen // 2 + noise(*small, count, seed=2) // 2).contiguous()
    frames = (source, seen, edit)
    there = [x.cuda() if CUDA else x for x in frames]
    assert torch.equal(fused.transfer.transfer(*there).cpu(), transfer(*frames))
    if CUDA:  # else the line above says it
        assert torch.equal(fused.transfer.transfer(there[0], there[1], there[1]).cpu(), source)


@pytest.mark.parametrize("times", [3, -3])
def test_gains_beyond_what_they_can_be(fused: ModuleType, times: int) -> None:
    """Of edits that are three times the source, and of its negative: at the bounds. Further beyond
    a byte that turned over might show the same."""
    seen = noise(1, 3) // 8 + 112
    edit = (128 + (seen.int() - 128) * times).clamp(0, 255).to(torch.uint8)
    wanted = gains(seen, edit)
    assert (wanted == (255 if times > 0 else 0)).all()
    there = [x.cuda() if CUDA else x for x in (seen, edit)]
    assert torch.equal(fused.transfer.gains(*there).cpu(), wanted)


@pytest.mark.parametrize("small", [(3, 16), *(small for _, small in SIZES[3:])])
def test_following(fused: ModuleType, small: tuple[int, int]) -> None:
    """A tone with a little noise on one side, which is dropped, and anything on the other."""
    seen = noise(*small)
    edit = (seen.int() // 2 + 40 + noise(*small, seed=1) % 5).to(torch.uint8)
    edit[:, :, : small[1] // 2] = noise(*small, seed=2)[:, :, : small[1] // 2]
    there = [x.cuda() if CUDA else x for x in (seen, edit)]
    wanted = following(seen, edit)
    kept = wanted == edit
    assert kept.any()
    assert not kept.all()
    assert torch.equal(fused.guide.following(*there).cpu(), wanted)
