"""Every refusal of this folder, from one list; what lies just inside its border is not refused."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.manifest import read_dataset_info
from data.pairs import PairList
from data.sample import Pair, from_files, to_files
from data.shards import check_dataset, write_dataset
from data.store import DatasetError, open_store
from data.synthetic import make_pair
from data.video import VideoError, VideoWriter, read_frames
from tests.data.conftest import numbered, small_encoded, small_pair, write_raw

Attempt = Callable[[Path], object]


def pair(**changes: Any) -> Pair:
    """Three black frames of 16 x 24; `video` changes both videos."""
    shape = changes.pop("shape", (3, 16, 24))
    video = np.zeros((*shape, 3), np.uint8)
    return replace(Pair(video, video, np.zeros(shape, bool), "x", 16.0, {}), **changes)


def writer(folder: Path, name: str = "o.mp4", **options: Any) -> None:
    frames = options.pop("frames", None)
    arguments: dict[str, Any] = {"width": 64, "height": 48, "fps": 16, **options}
    with VideoWriter(folder / name, **arguments) as out:
        shape = (1, arguments["height"], arguments["width"], 3)
        out.write(np.zeros(shape, np.uint8) if frames is None else frames)


def reader(folder: Path, **options: Any) -> None:
    path = folder / "in.mp4"
    if not path.exists():
        write_raw(path, numbered(2))
    list(read_frames(path, **options))


def dataset(folder: Path, *samples: Any, **options: Any) -> None:
    write_dataset(folder / "set", samples or [pair()], made_by={}, **options)


def manifest(folder: Path, **changes: Any) -> None:
    dataset(folder)
    path = folder / "set" / "dataset.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, **changes}))
    read_dataset_info(folder / "set")


def manifest_of(folder: Path, content: bytes) -> None:
    dataset(folder)
    (folder / "set" / "dataset.json").write_bytes(content)
    read_dataset_info(folder / "set")


def files_without(name: str, sample: Any) -> None:
    files = to_files(sample)
    del files[name]
    from_files(files)


def files_that_say(video_shape: list[int], **parts: np.ndarray) -> None:
    whole = pair()
    files = to_files(whole)
    about = json.loads(files["json"])
    files["json"] = json.dumps({**about, "video_shape": video_shape}).encode()
    for name, video in parts.items():
        files[f"{name}.mp4"] = to_files(replace(whole, source=video))["source.mp4"]
    from_files(files)


def pickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"code": 1}], dtype=object), allow_pickle=True)
    from_files({**to_files(small_encoded(0)), "text.npy": buffer.getvalue()})


def not_a_tar(folder: Path) -> None:
    """A shard whose checksum is right and whose content is none."""
    dataset(folder)
    shard, path = folder / "set" / "shard-00000.tar", folder / "set" / "dataset.json"
    shard.write_bytes(b"no tar file" * 1000)
    fields = json.loads(path.read_text())
    fields["shards"][0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    path.write_text(json.dumps(fields))
    check_dataset(folder / "set")


def listed(folder: Path, entry: Any) -> None:
    """Raises what a pair list says of its one entry."""
    for name in ("a.mp4", "b.mp4"):
        if not (folder / name).exists():
            write_raw(folder / name, numbered(4))
    (folder / "pairs.json").write_text(json.dumps([entry]))
    pairs = PairList(folder / "pairs.json", fps=16, frames=4, height=48, width=64)
    list(pairs)
    for left in pairs.left_out:
        raise ValueError(str(left))


def of_sizes(folder: Path, width: int, height: int) -> None:
    write_raw(folder / "b.mp4", numbered(4, height, width))
    write_raw(folder / "a.mp4", numbered(4, 48, 200))
    listed(folder, WHOLE)


def of_lengths(folder: Path, frames: int) -> None:
    write_raw(folder / "b.mp4", numbered(frames))
    listed(folder, WHOLE)


WHOLE = {"instruction": "x", "source_path": "a.mp4", "edited_path": "b.mp4"}
LIKE = r"sample 1 is .*, sample 0 is "

MISTAKES: list[tuple[str, type[Exception], Attempt]] = [
    # synthetic pairs
    ("split must be one of", ValueError, lambda _: make_pair(0, split="test")),
    ("at least 16x16 pixels", ValueError, lambda _: make_pair(0, height=15, width=16, frames=1)),
    ("at least 16x16 pixels", ValueError, lambda _: make_pair(0, height=16, width=15, frames=1)),
    ("one frame", ValueError, lambda _: make_pair(0, height=16, width=16, frames=0)),
    ("fps above 0", ValueError, lambda _: make_pair(0, height=16, width=16, fps=0)),
    # writing a video
    ("at least 2x2, got 1x48", VideoError, lambda f: writer(f, width=1)),
    ("at least 2x2, got 64x1", VideoError, lambda f: writer(f, height=1)),
    ("no codec", VideoError, lambda f: writer(f, codec="h265")),
    ("fps must be above 0", VideoError, lambda f: writer(f, fps=0)),
    ("fps must be above 0", VideoError, lambda f: writer(f, fps=-1)),
    ("cannot hold H.264", VideoError, lambda f: writer(f, "o.webm")),
    ("cannot hold H.264", VideoError, lambda f: writer(f, "o")),
    ("no folder", VideoError, lambda f: writer(f, "gone/o.mp4")),
    ("frames must be uint8", VideoError, lambda f: writer(f, frames=np.zeros((1, 48, 64, 3)))),
    ("frames must be uint8", VideoError, lambda f: writer(f, frames=_u8(1, 48, 63, 3))),
    ("frames must be uint8", VideoError, lambda f: writer(f, frames=_u8(1, 47, 64, 3))),
    ("frames must be uint8", VideoError, lambda f: writer(f, frames=_u8(1, 48, 64))),
    ("frames must be uint8", VideoError, lambda f: writer(f, frames=_u8(1, 48, 64, 4))),
    ("frames must be uint8", VideoError, lambda f: writer(f, frames=_u8(48, 64, 3))),
    ("no frame was written", VideoError, lambda f: writer(f, frames=_u8(0, 48, 64, 3))),
    ("audio cannot be read", VideoError, lambda f: writer(f, audio_from=f / "gone.mp4")),
    # reading one
    ("no such file", VideoError, lambda f: list(read_frames(f / "gone.mp4"))),
    ("must not be negative", ValueError, lambda f: reader(f, start=-1)),
    ("must not be negative", ValueError, lambda f: reader(f, count=-1)),
    (r"fps must lie in \(0, 1000\]", ValueError, lambda f: reader(f, fps=0)),
    (r"fps must lie in \(0, 1000\]", ValueError, lambda f: reader(f, fps=-1)),
    (r"fps must lie in \(0, 1000\]", ValueError, lambda f: reader(f, fps=Fraction(10001, 10))),
    ("at least one pixel", ValueError, lambda f: reader(f, size=(0, 4))),
    ("at least one pixel", ValueError, lambda f: reader(f, size=(4, 0))),
    # samples
    ("json", KeyError, lambda _: files_without("json", pair())),
    ("target.mp4", KeyError, lambda _: files_without("target.mp4", pair())),
    ("mask.mp4", KeyError, lambda _: files_without("mask.mp4", pair())),
    ("text.npy", KeyError, lambda _: files_without("text.npy", small_encoded(0))),
    ("allow_pickle", ValueError, lambda _: pickled()),
    ("source is", ValueError, lambda _: files_that_say([2, 16, 24])),
    ("source is", ValueError, lambda _: files_that_say([3, 24, 16])),
    ("target is", ValueError, lambda _: files_that_say([3, 16, 24], target=_u8(2, 16, 24, 3))),
    ("mask is", ValueError, lambda _: files_that_say([3, 16, 24], mask=_u8(3, 16, 26, 3))),
    # datasets
    ("samples_per_shard must be at least 1", ValueError, lambda f: dataset(f, samples_per_shard=0)),
    ("workers at least 0", ValueError, lambda f: dataset(f, workers=-1)),
    (LIKE, DatasetError, lambda f: dataset(f, small_encoded(0), small_pair(0))),
    (LIKE, DatasetError, lambda f: dataset(f, pair(), pair(fps=15.0))),
    (LIKE, DatasetError, lambda f: dataset(f, pair(), pair(shape=(2, 16, 24)))),
    (LIKE, DatasetError, lambda f: dataset(f, pair(), pair(shape=(3, 24, 16)))),
    # it is counted over the shards that are written
    (
        "sample 3 is",
        DatasetError,
        lambda f: dataset(f, *[pair()] * 3, pair(fps=15.0), samples_per_shard=2),
    ),
    ("holds a finished dataset", DatasetError, lambda f: (dataset(f), dataset(f))),
    ("unknown place", DatasetError, lambda _: open_store("http://host/set")),
    ("unknown place", DatasetError, lambda _: open_store("s3:/bucket/set")),
    ("names no bucket", DatasetError, lambda _: open_store("s3://")),
    ("names no bucket", DatasetError, lambda _: open_store("s3:///")),
    ("no dataset here", DatasetError, lambda f: read_dataset_info(f)),
    ("format version 2", DatasetError, lambda f: manifest(f, format_version=2)),
    ("format version 0", DatasetError, lambda f: manifest(f, format_version=0)),
    ("is damaged", DatasetError, lambda f: manifest(f, more=1)),
    ("is damaged", DatasetError, lambda f: manifest_of(f, b'{"format_version": "\xe9"}')),
    ("is damaged", DatasetError, lambda f: manifest_of(f, b"[1]")),
    ("is damaged", DatasetError, lambda f: manifest(f, shards=[{"name": "x"}])),
    ("is damaged", DatasetError, lambda f: manifest(f, shards=None)),
    ("is no tar file", DatasetError, not_a_tar),
    ("is missing", DatasetError, lambda f: open_store(f).read("gone")),
    ("set: a file is in the way", DatasetError, lambda f: ((f / "set").touch(), dataset(f))),
    # pair lists
    ("is list, not an object", ValueError, lambda f: listed(f, [])),
    *(
        (f"{key} is missing, empty or not text", ValueError, _entry)
        for key in WHOLE
        for wrong in ("", "  ", None, 3)
        for _entry in [lambda f, key=key, wrong=wrong: listed(f, {**WHOLE, key: wrong})]
    ),
    ("shape 206x48 is not that of its source", ValueError, lambda f: of_sizes(f, 206, 48)),
    ("shape 194x48 is not that of its source", ValueError, lambda f: of_sizes(f, 194, 48)),
    ("too short: 3 frames at 16 fps, 4 needed", ValueError, lambda f: of_lengths(f, 3)),
]

FINE: list[Attempt] = [
    lambda _: make_pair(0, height=16, width=16, frames=1, fps=0.1),
    lambda f: writer(f, width=2),
    lambda f: writer(f, height=2),
    lambda f: writer(f, fps=Fraction(1, 10)),
    lambda f: writer(f, "o.MKV"),
    lambda f: writer(f, "o.m4v"),
    lambda f: writer(f, "o.mov"),
    lambda f: reader(f, start=0, count=0),
    lambda f: reader(f, fps=1000, count=2),
    lambda f: reader(f, fps=0.5),
    lambda f: reader(f, size=(1, 1)),
    lambda _: files_that_say([3, 16, 24]),
    lambda f: dataset(f, samples_per_shard=1, workers=0),
    lambda f: dataset(f, pair(), pair(instruction="y", origin={"a": 1})),
    lambda f: (dataset(f), dataset(f, overwrite=True)),
    lambda f: manifest(f, made_by={"anything": [1]}),
    lambda f: listed(f, WHOLE),
    lambda f: of_sizes(f, 202, 48),
    lambda f: of_sizes(f, 198, 48),
    lambda f: of_lengths(f, 4),
    lambda f: of_lengths(f, 5),
]


def _u8(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda n: f"{n}-{MISTAKES[n][0]}")
def test_a_mistake_is_refused_by_name(tmp_path: Path, number: int) -> None:
    words, kind, attempt = MISTAKES[number]
    with pytest.raises(kind, match=words):
        attempt(tmp_path)
    left = [path for path in tmp_path.rglob("*") if path.name.startswith((".", "o"))]
    assert left == []


@pytest.mark.parametrize("number", range(len(FINE)))
def test_what_lies_just_inside_is_not_refused(tmp_path: Path, number: int) -> None:
    FINE[number](tmp_path)


def test_a_shard_that_is_cut_short_is_told_by_its_figures(tmp_path: Path) -> None:
    dataset(tmp_path)
    (shard,) = read_dataset_info(tmp_path / "set").shards
    path = tmp_path / "set" / shard.name
    path.write_bytes(path.read_bytes()[:-700])
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DatasetError) as raised:
        check_dataset(tmp_path / "set")
    assert (
        f"expected {shard.bytes} bytes with sha256 {shard.sha256[:16]}..., found "
        f"{shard.bytes - 700} bytes with {found[:16]}..."
    ) in str(raised.value)
