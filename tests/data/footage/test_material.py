"""data/footage/material.py: which files there are, of which split, and what is kept of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.footage import material
from data.footage.material import (
    FootageError,
    footage_hash,
    is_heldout,
    names_by_split,
    prepare,
    read_heldout,
)
from data.video import VideoWriter
from tests.data.footage.conftest import SIZE


def test_a_dataset_knows_its_files_again_by_name_and_bytes(tmp_path: Path) -> None:
    """The name decides the split, so a file that is renamed is another."""
    for name, content in (("a.jpg", b"one"), ("sub/b.MP4", b"two"), ("notes.txt", b"x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    first = footage_hash(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"y")  # neither photo nor clip
    (tmp_path / "sub").rename(tmp_path / "there")
    assert footage_hash(tmp_path) == first
    (tmp_path / "a.jpg").rename(tmp_path / "c.jpg")
    renamed = footage_hash(tmp_path)
    (tmp_path / "c.jpg").write_bytes(b"two")
    changed = footage_hash(tmp_path)
    (tmp_path / "there" / "b.MP4").unlink()
    assert len({first, renamed, changed, footage_hash(tmp_path)}) == 4


def test_a_list_of_what_is_held_out_may_have_comments(tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/b.png", "c.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert read_heldout(tmp_path) is None
    by_hash = names_by_split(tmp_path)
    assert sorted(by_hash["train"] + by_hash["heldout"]) == ["a.jpg", "b.png", "c.mp4"]
    assert [name for name in ("a.jpg", "b.png", "c.mp4") if is_heldout(name)] == by_hash["heldout"]
    (tmp_path / "heldout.txt").write_text("# kept\n\n  b.png  # the good one\nc.mp4\n")
    assert read_heldout(tmp_path) == {"b.png", "c.mp4"}
    assert names_by_split(tmp_path) == {"train": ["a.jpg"], "heldout": ["c.mp4", "b.png"]}


def test_photos_and_clips_are_known_by_the_ends_of_their_names(tmp_path: Path) -> None:
    photos = [".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"]
    clips = [".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v"]
    for end in (*photos, *clips, ".gif", ".txt"):
        (tmp_path / f"a{end}").touch()
    (tmp_path / "heldout.txt").touch()
    assert names_by_split(tmp_path)["train"] == sorted(f"a{end}" for end in photos + clips)


def test_which_names_are_held_out_does_not_move() -> None:
    """One in eight; another one would put into training what was kept from it."""
    held = [n for n in range(60) if is_heldout(f"IMG_{n:04d}.jpg")]
    assert held == [2, 11, 15, 18, 26, 41, 55, 57]


def test_a_level_is_half_of_the_one_above_each_pixel_the_mean_of_four() -> None:
    frames = np.zeros((2, 5, 7, 3), np.uint8)
    frames[1, :2, :2, 0] = [[1, 2], [3, 4]]
    frames[1, 2:4, 4:6, 2] = [[255, 255], [255, 254]]
    frames[:, 4], frames[:, :, 6] = 99, 99  # odd ones out
    half = material._halved(frames)
    assert half.shape == (2, 2, 3, 3)
    assert half.dtype == np.uint8
    assert (half[1, 0, 0].tolist(), half[1, 1, 2].tolist()) == ([3, 0, 0], [0, 0, 255])
    assert half.sum() == 258


def test_each_file_is_told_as_it_is_done_and_is_no_larger_than_it_need_be(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    Image.new("RGB", (100, 90)).save(source / "small.PNG")
    for name, width, height in (("c.mp4", 130, 96), ("d.mp4", 96, 130)):
        with VideoWriter(source / name, width, height, 16) as writer:
            writer.write(np.zeros((4, height, width, 3), np.uint8))
    (source / "heldout.txt").write_text("")
    told: list[tuple[int, int]] = []
    found = prepare(
        source, tmp_path / "new" / "out", height=24, width=40, fps=8,
        on_file=lambda done, total: told.append((done, total)),
    )["train"]  # fmt: skip
    assert told == [(1, 3), (2, 3), (3, 3)]
    (photo,), (clip, upright) = found.photos, found.clips
    assert (photo.name, photo.kind, clip.name, clip.kind) == (
        "small.PNG", "photo", "c.mp4", "clip",
    )  # fmt: skip
    assert photo.level(0).shape == (1, 90, 100, 3)  # no photo is made larger than it is
    assert clip.level(0).shape == (2, 54, 74, 3)  # 2.25 times 24, even, at the rate asked for
    assert upright.level(0).shape == (2, 74, 54, 3)
    with pytest.raises(FootageError, match="is no folder"):
        prepare(source / "c.mp4", tmp_path / "x", height=24, width=40, fps=8)
    (source / "e.mp4").write_bytes(b"no clip")
    with pytest.raises(FootageError, match=r"e\.mp4: not a .*take it out of the footage"):
        prepare(source, tmp_path / "x", height=24, width=40, fps=8)


@pytest.mark.parametrize(("filmed", "fps", "kept"), [(32, 2, 30), (32, 1, 15), (29, 2, 29)])
def test_of_a_clip_its_first_15_seconds_are_kept(
    tmp_path: Path, filmed: int, fps: int, kept: int
) -> None:
    with VideoWriter(tmp_path / "c.mp4", 64, 48, 2) as writer:
        writer.write(np.zeros((filmed, 48, 64, 3), np.uint8))
    (tmp_path / "heldout.txt").write_text("")
    (clip,) = prepare(tmp_path, tmp_path / "made", height=48, width=80, fps=fps)["train"].clips
    assert clip.level(0).shape == (kept, 48, 64, 3)  # and not made larger than it is


@pytest.mark.parametrize(("height", "width"), [(48, 80), (80, 48)])
def test_footage_is_kept_as_fine_as_the_shorter_side_asks(
    tmp_path: Path, height: int, width: int
) -> None:
    Image.new("RGB", (600, 400)).save(tmp_path / "a.png")
    (tmp_path / "heldout.txt").write_text("")
    found = prepare(tmp_path, tmp_path / "made", height=height, width=width, fps=16)["train"]
    (photo,) = found.photos
    sizes = [photo.level(n).shape[1:3] for n in range(len(photo.levels))]
    assert sizes == [(336, 504), (168, 252), (84, 126), (42, 63)]  # 7 times 48, and down to it


@pytest.mark.parametrize(
    ("side", "size", "levels"),
    [
        (48, (96, 48), 2),  # just twice the smallest level: that one is made
        (48, (96, 47), 1),
        (16, (60, 48), 2),  # pairs so small that no level is
        (16, (60, 47), 1),
        (64, (80, 64), 2),  # half a pair's short side is enough
        (64, (80, 63), 1),
        (64, (60, 130), 1),  # the picture's shorter side counts, upright or wide
    ],
)
def test_a_level_is_made_as_long_as_half_of_it_is_not_too_small(
    tmp_path: Path, side: int, size: tuple[int, int], levels: int
) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    (tmp_path / "heldout.txt").write_text("")
    found = prepare(tmp_path, tmp_path / "made", height=side, width=side + 8, fps=16)["train"]
    assert [len(photo.levels) for photo in found.photos] == [levels]


def test_two_files_of_one_name_are_two(tmp_path: Path) -> None:
    """As two cameras leave them."""
    for folder, colour in (("one", "red"), ("other", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (60, 40), colour).save(tmp_path / folder / "IMG_1.png")
    (tmp_path / "heldout.txt").write_text("")
    found = prepare(tmp_path, tmp_path / "made", fps=16, **SIZE)["train"]
    assert [tuple(photo.level(0)[0, 0, 0]) for photo in found.photos] == [(255, 0, 0), (0, 0, 255)]


def test_a_photo_stands_as_a_viewer_shows_it(tmp_path: Path) -> None:
    """A phone held upright writes it lying down, and beside it how to turn it."""
    lying = Image.new("RGB", (80, 60), "red")
    lying.paste("blue", (0, 0, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn it right by a quarter
    lying.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "heldout.txt").write_text("")
    (photo,) = prepare(tmp_path, tmp_path / "made", fps=16, **SIZE)["train"].photos
    picture = photo.level(0)[0]
    assert picture.shape == (80, 60, 3)
    assert tuple(picture[0, 30]) == (0, 0, 255)
    assert tuple(picture[79, 30]) == (255, 0, 0)


def test_footage_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FootageError, match="holds no photo"):
        prepare(tmp_path, tmp_path / "prepared", fps=16, **SIZE)
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(FootageError, match=r"broken\.jpg: cannot be read as a photo"):
        prepare(tmp_path, tmp_path / "prepared", fps=16, **SIZE)
    (tmp_path / "broken.jpg").unlink()
    Image.new("RGB", (200, 100)).save(tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)  # twice that is no photo any more
    with pytest.raises(FootageError, match=r"vast\.png: cannot be read as a photo"):
        prepare(tmp_path, tmp_path / "prepared", fps=16, **SIZE)


@pytest.mark.parametrize(
    ("mode", "colour", "shown"),
    [
        ("L", 77, (77, 77, 77)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_a_photo_of_any_kind_has_three_colours(
    tmp_path: Path, mode: str, colour: Any, shown: tuple[int, int, int]
) -> None:
    Image.new(mode, (60, 40), colour).save(tmp_path / "a.png")
    (tmp_path / "heldout.txt").write_text("")
    (photo,) = prepare(tmp_path, tmp_path / "made", fps=16, **SIZE)["train"].photos
    assert photo.level(0).shape == (1, 40, 60, 3)
    assert (photo.level(0) == shown).all()


def test_a_photo_that_is_made_smaller_is_not_made_coarser(tmp_path: Path) -> None:
    """Black and white points are grey from afar. Workers share it: it is mapped, and once."""
    points = np.indices((400, 600)).sum(axis=0) % 2 * 255
    Image.fromarray(points.astype(np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "heldout.txt").write_text("")
    (photo,) = prepare(tmp_path, tmp_path / "made", fps=16, height=24, width=40)["train"].photos
    picture = photo.level(0)
    assert picture.shape == (1, 168, 252, 3)
    assert picture.std() < 20
    assert isinstance(picture, np.memmap)
    assert photo.level(0) is picture


def test_files_are_prepared_by_as_many_processes_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def here(work: Any, files: Any, workers: int) -> Any:
        asked.append(workers)
        return map(work, files)

    monkeypatch.setattr(material, "map_in_order", here)
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    for given in ({}, {"workers": 3}):
        prepare(tmp_path, tmp_path / "made", fps=16, **SIZE, **given)
    assert asked == [0, 3]
