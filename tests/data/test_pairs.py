"""data/pairs.py: real pairs in, unusable ones reported by name and left out."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data import pairs as pairs_module
from data.pairs import PairList, PairListError, estimate_mask
from data.shards import DatasetError, write_dataset
from data.video import VideoError, VideoInfo
from data.video.source.colour import BT601, BT709
from tests.data.conftest import edited_middle as edited
from tests.data.conftest import number_of, numbered, write_raw


def entry(source: str, target: str, instruction: str = "add a blue square") -> dict[str, str]:
    return {"instruction": instruction, "source_path": source, "edited_path": target}


def write_list(folder: Path, entries: object) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps(entries))
    return path


def read(path: Path, **options: object) -> PairList:
    arguments = {"fps": 16, "frames": 9, "height": 48, "width": 64, **options}
    return PairList(path, **arguments)  # type: ignore[arg-type]


def test_pairs_of_other_rates_and_sizes_become_one_shape(tmp_path: Path) -> None:
    frames = numbered(20, 72, 128)
    (tmp_path / "clips").mkdir()
    write_raw(tmp_path / "clips" / "a.mp4", frames, fps=32)
    write_raw(tmp_path / "b.mkv", edited(frames), fps=32)
    path = write_list(tmp_path, [entry("clips/a.mp4", str(tmp_path / "b.mkv"), " make it so ")])
    pairs = read(path)
    (pair,) = list(pairs)
    assert len(pairs) == 1
    assert pairs.left_out == []
    assert pair.instruction == "make it so"
    assert pair.video_shape == (9, 48, 64)
    assert pair.fps == 16.0
    assert [number_of(f) for f in pair.source] == list(range(0, 18, 2))
    assert pair.origin["source_path"] == "clips/a.mp4"
    # The blue square is found, and nothing else: 72x128 is scaled by 2/3 and cut to the middle.
    assert pair.mask[:, 17:23, 20:30].mean() > 0.5
    rest = pair.mask.copy()
    rest[:, 14:26, 8:34] = False
    assert not rest.any()


def test_unusable_pairs_are_reported_by_name_and_left_out(tmp_path: Path) -> None:
    frames = numbered(16)
    write_raw(tmp_path / "good.mp4", frames)
    write_raw(tmp_path / "edit.mp4", edited(frames))
    write_raw(tmp_path / "short.mp4", frames[:5])
    write_raw(tmp_path / "longer.mp4", np.concatenate([frames, frames]))
    write_raw(tmp_path / "square.mp4", numbered(16, 48, 48))
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    entries = [
        entry("good.mp4", "edit.mp4"),
        entry("good.mp4", "missing.mp4"),
        entry("broken.mp4", "edit.mp4"),
        entry("good.mp4", "short.mp4"),
        entry("good.mp4", "longer.mp4"),
        entry("good.mp4", "square.mp4"),
        {"instruction": "x", "source_path": "good.mp4"},
        entry("good.mp4", "edit.mp4", "  "),
        "text",
        entry("edit.mp4", "good.mp4", "take it away"),
    ]
    pairs = read(write_list(tmp_path, entries))
    kept = list(pairs)
    # Entry 4 is longer than its source, but both hold enough frames.
    assert [p.origin["entry"] for p in kept] == [0, 4, 9]
    reasons = {left.index: (Path(left.path).name, left.reason) for left in pairs.left_out}
    expected = {
        1: ("missing.mp4", "no such file"),
        2: ("broken.mp4", "not a readable video"),
        3: ("short.mp4", "too short: 5 frames at 16 fps, 9 needed"),
        5: ("square.mp4", "48x48 is not that of its source, 64x48"),
        6: ("pairs.json", "edited_path is missing"),
        7: ("pairs.json", "instruction is missing, empty"),
        8: ("pairs.json", "is str, not an object"),
    }
    assert reasons.keys() == expected.keys()
    for index, (name, words) in expected.items():
        assert reasons[index][0] == name
        assert words in reasons[index][1]
        assert name not in reasons[index][1]  # it is told beside it
    assert str(pairs.left_out[0]).startswith("entry 1: ")
    assert len(list(pairs)) == 3  # a second pass reports once, not twice
    assert len(pairs.left_out) == 7


def test_a_file_that_no_decoder_or_scaler_takes_is_named_and_left_out(tmp_path: Path) -> None:
    write_raw(tmp_path / "good.mp4", numbered(16))
    write_raw(tmp_path / "thin.mp4", numbered(16, 4000, 2))
    write_raw(tmp_path / "raw.h264", numbered(16), fps=16)
    write_raw(tmp_path / "loud.mp4", numbered(16), audio="aac")
    whole = (tmp_path / "loud.mp4").read_bytes()
    (tmp_path / "noise.mp4").write_bytes(whole[:200] + bytes(len(whole) - 200))
    names = ["thin.mp4", "raw.h264", "noise.mp4", "good.mp4"]
    pairs = read(
        write_list(tmp_path, [entry(n, n) for n in names]), height=480, width=832, frames=9
    )
    assert [p.origin["source_path"] for p in pairs] == ["raw.h264", "good.mp4"]
    assert [(Path(left.path).name, left.index) for left in pairs.left_out] == [
        ("thin.mp4", 0),
        ("noise.mp4", 2),
    ]
    assert "frames of 2x4000 cannot be cut to 832x480" in pairs.left_out[0].reason


@pytest.mark.parametrize(
    "raised", [MemoryError("no memory"), ValueError("no"), av.FFmpegError(1, "no", "b.mp4")]
)
def test_whatever_a_decoder_makes_of_one_file_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_raw(tmp_path / name, numbered(9))
    frames = pairs_module.read_frames

    def failing(path: Path, **about: Any) -> Any:
        if path.name == "b.mp4":
            raise raised
        return frames(path, **about)

    monkeypatch.setattr(pairs_module, "read_frames", failing)
    pairs = read(write_list(tmp_path, [entry("a.mp4", "b.mp4"), entry("a.mp4", "a.mp4")]))
    assert [pair.origin["entry"] for pair in pairs] == [1]
    assert [(left.index, Path(left.path).name) for left in pairs.left_out] == [(0, "b.mp4")]
    assert "no" in pairs.left_out[0].reason


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("lines", [False, True])
def test_lists_may_be_lines_and_have_a_mark(tmp_path: Path, mark: str, lines: bool) -> None:
    write_raw(tmp_path / "a.mp4", numbered(16))
    entries = [entry("a.mp4", "a.mp4", text) for text in ("one", "zwei \u00fc")]
    text = "\n".join(map(json.dumps, entries)) + "\n\n" if lines else json.dumps(entries)
    path = tmp_path / "pairs.jsonl"
    path.write_text(mark + text, encoding="utf-8")
    assert [pair.instruction for pair in read(path)] == ["one", "zwei \u00fc"]
    if lines:
        path.write_text(mark + json.dumps(entries[1]) + "\n", encoding="utf-8")
        assert [pair.instruction for pair in read(path)] == ["zwei \u00fc"]
        path.write_text(mark + text + '{"instruction": \n', encoding="utf-8")
        with pytest.raises(PairListError, match="line 4 is not JSON"):
            read(path)


@pytest.mark.parametrize(
    ("source", "edit", "read_as"),
    [
        ((1280, 720, None), (640, 360, None), BT709),  # by the larger, whichever of both it is
        ((640, 360, None), (1280, 720, None), BT709),
        ((1024, 576, None), (640, 360, None), BT601),
        ((720, 1000, None), (360, 500, None), BT709),  # as tall as HD
        ((640, 360, BT709), (320, 180, None), BT709),  # by the tag of the one that has one
        ((640, 360, None), (320, 180, BT709), BT709),
        ((1280, 720, None), (640, 360, BT601), BT601),
    ],
)
def test_colours_without_a_tag_are_read_as_the_other_s(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: tuple[int, int, int | None],
    edit: tuple[int, int, int | None],
    read_as: int,
) -> None:
    """Both of them: one rule for a pair."""
    shown = {"a.mp4": source, "b.mp4": edit}
    like = VideoInfo(1, 1, Fraction(16), 16, 1.0, has_audio=False, codec="h264", rotation=0)
    asked: list[tuple[str, object]] = []

    def probed(path: Path) -> VideoInfo:
        width, height, matrix = shown[path.name]
        return replace(like, width=width, height=height, matrix=matrix)

    def frames(path: Path, *, untagged: int, **_: object) -> list[np.ndarray]:
        asked.append((path.name, untagged))
        return [np.zeros((48, 64, 3), np.uint8)] * 9

    monkeypatch.setattr(pairs_module, "probe", probed)
    monkeypatch.setattr(pairs_module, "read_frames", frames)
    assert len(list(read(write_list(tmp_path, [entry("a.mp4", "b.mp4")])))) == 1
    assert asked == [("a.mp4", read_as), ("b.mp4", read_as)]


@pytest.mark.parametrize(
    ("width", "fits"), [(981, True), (979, False), (1019, True), (1021, False)]
)
def test_shapes_may_differ_by_two_per_cent(width: int, fits: bool) -> None:
    like = VideoInfo(1, 1, Fraction(16), 16, 1.0, has_audio=False, codec="h264", rotation=0)
    source, edit = (replace(like, width=w, height=1000) for w in (1000, width))
    assert (pairs_module._mismatch(source, edit) is None) == fits


def test_other_rates_of_one_length_are_no_mismatch(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.mp4", numbered(16), fps=16)
    write_raw(tmp_path / "b.mp4", numbered(25), fps=25)
    write_raw(tmp_path / "c.mp4", numbered(24), fps=Fraction(24000, 1001))
    pairs = read(write_list(tmp_path, [entry("a.mp4", "b.mp4"), entry("a.mp4", "c.mp4")]))
    assert len(list(pairs)) == 2, pairs.left_out


def test_estimated_mask_ignores_the_noise_of_encoding() -> None:
    rng = np.random.default_rng(0)
    source = rng.integers(60, 200, (3, 40, 50, 3), dtype=np.uint8)
    target = source.copy()
    target[:, 10:30, 20:40] ^= 128
    noisy = np.clip(target + rng.normal(0, 5, target.shape), 0, 255).astype(np.uint8)
    mask = estimate_mask(source, noisy)
    assert mask[:, 11:29, 21:39].all()
    assert not mask[:, :8].any()
    assert not mask[:, :, 43:].any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "must be a JSON list of objects"),
        ('{"instruction": "x"}', "must be a JSON list of objects"),
        ("3", "must be a JSON list, got int$"),
        ('{"a": 1, "b": 2}', "and edited_path, got dict of 2$"),
        ("{}\n{]", "line 2 is not JSON"),
        ("a\n{}", "is not JSON .*see data/README.md"),
        ("{}\na", "is not JSON .*see data/README.md"),  # its second line is no object either
        ("\xe9", "is not text in UTF-8 .*save it as UTF-8"),
    ],
)
def test_a_list_that_is_none_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "pairs.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(PairListError, match=words) as raised:
        read(path)
    assert str(path) in str(raised.value)


def test_a_list_without_usable_pairs_makes_no_dataset(tmp_path: Path) -> None:
    pairs = read(write_list(tmp_path, [entry("gone.mp4", "gone.mp4")]))
    with pytest.raises(DatasetError, match="no sample to write"):
        write_dataset(tmp_path / "set", pairs, made_by={})
    assert len(pairs.left_out) == 1
    assert not (tmp_path / "set" / "dataset.json").exists()


def test_errors_of_lists_and_videos_are_value_errors() -> None:
    assert issubclass(PairListError, ValueError)
    assert issubclass(VideoError, ValueError)
