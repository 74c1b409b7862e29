from __future__ import annotations

import pytest
import torch

from modeling.streaming.waiting import PendingFrames


def numbered(first: int, stop: int) -> torch.Tensor:
    """Frames that are full of their own number."""
    return torch.arange(first, stop, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 4, 3)


def filled(*ends: int) -> PendingFrames:
    waiting = PendingFrames(2, 4)
    for first, stop in zip((0, *ends), ends, strict=False):
        waiting.add(numbered(first, stop))
    return waiting


@pytest.mark.parametrize("ends", [(12,), (4, 8, 12), (1, 1, 2, 7, 12), (5, 12)])
def test_frames_are_what_was_added_whatever_they_came_in(ends: tuple[int, ...]) -> None:
    waiting = filled(*ends)
    assert len(waiting) == 12
    for first in range(13):
        for stop in range(first, 13):
            assert torch.equal(waiting.between(first, stop), numbered(first, stop))
    for dropped, gone in ((0, 0), (1, 1), (6, 7), (5, 12)):
        waiting.drop(dropped)
        assert torch.equal(waiting.between(0, len(waiting)), numbered(gone, 12))
    waiting.add(numbered(12, 14))
    assert torch.equal(waiting.between(0, 2), numbered(12, 14))


def test_a_camera_may_write_where_its_frames_were() -> None:
    waiting, frames = PendingFrames(2, 4), numbered(0, 3).clone()
    waiting.add(frames)
    frames.zero_()
    assert torch.equal(waiting.between(0, 3), numbered(0, 3))


def test_frames_of_one_piece_are_not_copied_again() -> None:
    waiting = filled(4, 8)
    assert waiting.between(4, 8).data_ptr() == waiting.between(4, 5).data_ptr()
