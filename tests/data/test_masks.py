"""data/pairs.py: what is source, what is target, and where they differ."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import sample
from data.pairs import PairList, estimate_mask
from data.sample import Pair, to_files
from data.video import VideoWriter, read_own
from tests.data.conftest import numbered, write_raw


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize(("difference", "edited"), [(20, False), (21, True), (255, True)])
@pytest.mark.parametrize("brighter", [False, True])
def test_every_channel_alone_makes_a_mask_above_the_threshold(
    channel: int, difference: int, edited: bool, brighter: bool
) -> None:
    dark = np.zeros((2, 9, 12, 3), np.uint8)
    light = dark.copy()
    light[1, ..., channel] = difference
    mask = estimate_mask(dark, light) if brighter else estimate_mask(light, dark)
    assert mask.shape == (2, 9, 12)
    assert mask.dtype == bool
    assert not mask[0].any()
    assert mask[1].all() if edited else not mask[1].any()


@pytest.mark.parametrize(("difference", "size"), [(180, 0), (181, 3)])
def test_the_difference_is_a_mean_over_nine_pixels(difference: int, size: int) -> None:
    source, target = (np.full((1, 11, 13, 3), 30, np.uint8) for _ in range(2))
    target[0, 4, 7] = (30, 30 + difference, 30)
    wanted = np.zeros((1, 11, 13), bool)
    wanted[0, 4 - size // 2 : 5 + size // 2, 7 - size // 2 : 8 + size // 2] = size > 0
    np.testing.assert_array_equal(estimate_mask(source, target), wanted)


def test_channels_do_not_add_up() -> None:
    source = np.zeros((1, 6, 6, 3), np.uint8)
    assert not estimate_mask(source, source + 20).any()


def test_a_border_counts_as_what_lies_beside_it() -> None:
    source = np.zeros((1, 8, 8, 3), np.uint8)
    target = source.copy()
    target[:, :, 0] = 31  # two of three columns of the border's mean: 20.67
    mask = estimate_mask(source, target)
    assert mask[:, :, 0].all()
    assert not mask[:, :, 1:].any()


def painted(frames: np.ndarray) -> np.ndarray:
    out = frames.copy()
    out[:, 24:40, 32:56] = (20, 240, 60)
    return out


def ingested(folder: Path, **options: object) -> PairList:
    write_raw(folder / "before.mp4", numbered(16))
    write_raw(folder / "after.mp4", painted(numbered(16)))
    entry = {"instruction": "paint", "source_path": "before.mp4", "edited_path": "after.mp4"}
    (folder / "pairs.json").write_text(json.dumps([entry]))
    wanted = {"fps": 16, "frames": 9, "height": 48, "width": 64, **options}
    return PairList(folder / "pairs.json", **wanted)  # type: ignore[arg-type]


def test_the_source_is_the_one_before_and_the_target_the_edited_one(tmp_path: Path) -> None:
    (pair,) = list(ingested(tmp_path))
    for video, drawn in ((pair.source, numbered(9)), (pair.target, painted(numbered(9)))):
        difference = np.abs(video.astype(int) - drawn)
        assert difference.mean() < 3
        assert difference[:, 28:36, 36:52].max() < 8
    inner = np.zeros((9, 48, 64), bool)
    inner[:, 26:38, 34:54] = True
    assert pair.mask[inner].all()
    assert pair.mask.mean() < 0.17  # 16 x 24 pixels and their border, of 48 x 64
    assert pair.origin == {
        "list": "pairs.json",
        "entry": 0,
        "source_path": "before.mp4",
        "edited_path": "after.mp4",
        "mask": "estimated",
    }


@pytest.mark.parametrize(("frames", "usable"), [(15, True), (16, True), (17, False)])
def test_as_many_frames_as_there_are_and_no_more(tmp_path: Path, frames: int, usable: bool) -> None:
    pairs = ingested(tmp_path, frames=frames)
    assert [len(pair.source) for pair in pairs] == [frames] * usable
    assert [left.index for left in pairs.left_out] == [0] * (not usable)


def test_a_mask_is_stored_without_loss() -> None:
    """And not only on the right side of half."""
    mask = np.random.default_rng(0).random((3, 18, 26)) > 0.5
    video = np.full((3, 18, 26, 3), 77, np.uint8)
    files = to_files(Pair(video, video, mask, "nothing", 12.5))
    levels = np.stack(list(read_own(io.BytesIO(files["mask.mp4"]))))
    np.testing.assert_array_equal(levels[..., 0], 255 * mask.astype(np.uint8))


def test_how_finely_each_part_of_a_pair_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast to write; to be seen without loss, and the mask to be read without any."""
    asked: list[Any] = []

    class Noting(VideoWriter):
        def __init__(self, file: Any, width: int, height: int, fps: float, **about: Any) -> None:
            asked.append((width, height, fps, about))
            super().__init__(file, width, height, fps, **about)

    monkeypatch.setattr(sample, "VideoWriter", Noting)
    video = np.zeros((2, 18, 26, 3), np.uint8)
    to_files(Pair(video, video, np.zeros((2, 18, 26), bool), "x", 12.5))
    fine = {"preset": "veryfast", "reproducible": True}
    seen = fine | {"crf": 12, "pixel_format": "yuv444p"}
    exact = fine | {"crf": 0, "pixel_format": "gray"}
    assert asked == [(26, 18, 12.5, about) for about in (seen, seen, exact)]
