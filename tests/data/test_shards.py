"""data/shards.py: what is written comes back, and nothing else passes for it."""

from __future__ import annotations

import errno
import functools
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import webdataset

from data import shards as shards_module
from data.loader import Split, loader
from data.sample import EncodedPair, Pair, from_files, to_files
from data.shard_reader import ShardFolder, index_shard
from data.shards import (
    DatasetError,
    check_dataset,
    dataset_hash,
    read_dataset_info,
    write_dataset,
)
from data.store import S3Store, open_store
from data.video import read_own
from tests.data.conftest import Far, small_encoded, small_pair, write_small


def test_a_pair_survives_its_files() -> None:
    pair = small_pair(1)
    back = from_files(to_files(pair))
    assert isinstance(back, Pair)
    np.testing.assert_array_equal(back.mask, pair.mask)
    for name in ("source", "target"):
        error = getattr(back, name).astype(float) - getattr(pair, name)
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 38
    assert (back.instruction, back.fps, back.origin) == (pair.instruction, pair.fps, pair.origin)


@pytest.mark.parametrize(("height", "width"), [(31, 45), (32, 45), (17, 16)])
def test_odd_sizes_survive(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((3, height, width)) > 0.5
    video = np.full((3, height, width, 3), 77, np.uint8)
    back = from_files(to_files(Pair(video, video, mask, "nothing", 12.5, {})))
    np.testing.assert_array_equal(back.mask, mask)
    assert back.source.shape == video.shape
    coded = list(read_own(io.BytesIO(to_files(back)["mask.mp4"])))
    assert set(np.unique(coded)) == {0, 255}  # nothing is lost that a threshold would mend


def test_an_encoded_pair_survives_exactly() -> None:
    sample = small_encoded(3)
    # Shards that were written before hold a mask, which nobody read.
    back = from_files({**to_files(sample), "mask.npy": b""})
    assert isinstance(back, EncodedPair)
    for name in ("source", "target", "text"):
        np.testing.assert_array_equal(getattr(back, name), getattr(sample, name))
        assert getattr(back, name).dtype == getattr(sample, name).dtype
    assert back.video_shape == (5, 32, 48)


def test_written_dataset_says_what_it_holds(tmp_path: Path) -> None:
    info = read_dataset_info(write_small(tmp_path / "set"))
    assert (info.kind, info.samples, info.fps) == ("pairs", 7, 16.0)
    assert (info.frames, info.height, info.width) == (5, 32, 48)
    assert [s.count for s in info.shards] == [3, 3, 1]
    assert info.made_by == {"by": "test"}
    assert check_dataset(tmp_path / "set") == info
    names = sorted(p.name for p in (tmp_path / "set").iterdir())
    assert names == ["dataset.json", *(f"shard-{n:05d}.tar" for n in range(3))]


def test_webdataset_itself_reads_the_shards(tmp_path: Path) -> None:
    write_small(tmp_path / "set")
    shards = sorted(map(str, (tmp_path / "set").glob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{n:08d}" for n in range(7)]
    assert {"source.mp4", "target.mp4", "mask.mp4", "json"} <= samples[0].keys()


def test_processes_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    mapped = shards_module.map_in_order

    def noting(function: Any, items: Any, workers: int) -> Any:
        asked.append(workers)
        return mapped(function, items, workers)

    monkeypatch.setattr(shards_module, "map_in_order", noting)
    here = read_dataset_info(write_small(tmp_path / "a"))
    there = read_dataset_info(write_small(tmp_path / "b", workers=2))
    assert here == there
    assert asked == [0, 2]


def test_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    samples = [small_encoded(n) for n in range(4)]
    one = write_dataset(tmp_path / "a", samples, made_by={"host": "x"}, samples_per_shard=2)
    two = write_dataset(tmp_path / "b", samples, made_by={"host": "y"}, samples_per_shard=2)
    other = write_dataset(tmp_path / "c", samples[:3], made_by={}, samples_per_shard=2)
    assert dataset_hash(one) == dataset_hash(two) != dataset_hash(other)
    assert one.kind == "encoded"


def test_half_a_download_is_neither_taken_nor_left(tmp_path: Path) -> None:
    store = S3Store("s3://bucket/set")
    errors: list[Exception] = [OSError(errno.ENOSPC, "no space left")]

    def get(remote: str, local: str) -> None:
        assert remote == "bucket/set/shard"
        Path(local).write_text("half" if errors else "whole")
        if errors:
            raise errors.pop()

    store._files = SimpleNamespace(get_file=get)
    with pytest.raises(DatasetError):
        store.fetch("shard", tmp_path / "here")
    assert not list(tmp_path.iterdir())
    assert store.fetch("shard", tmp_path / "here").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def fails(seed: int) -> Pair:
    if seed == 5:
        raise RuntimeError("sample 5 failed")
    return small_pair(seed)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cut_off_dataset_says_so_and_can_be_written_again(tmp_path: Path, workers: int) -> None:
    uri = tmp_path / "set"
    samples = [functools.partial(fails, seed) for seed in range(7)]
    with pytest.raises(RuntimeError, match="sample 5 failed"):
        write_dataset(uri, samples, made_by={}, samples_per_shard=1, workers=workers)
    assert len(list(uri.iterdir())) == 5  # whole shards only, no temporary files
    with pytest.raises(DatasetError, match=r"cut off while being written \(5 shards"):
        read_dataset_info(uri)
    with pytest.raises(DatasetError, match="cut off"):
        loader(uri, Split(batch_size=1))
    write_small(uri)
    assert check_dataset(uri).samples == 7
    assert len(list(uri.glob("*.tar"))) == 3  # the longer leftover is gone


def test_a_finished_dataset_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    uri = write_small(tmp_path / "set")
    before = read_dataset_info(uri)
    with pytest.raises(DatasetError, match="holds a finished dataset already"):
        write_small(uri, count=2)
    assert check_dataset(uri) == before
    write_small(uri, count=2, overwrite=True)
    assert check_dataset(uri).samples == 2
    assert len(list(uri.glob("*.tar"))) == 1


def test_no_dataset_and_no_samples(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no dataset here"):
        read_dataset_info(tmp_path / "none")
    with pytest.raises(DatasetError, match="no sample to write"):
        write_dataset(tmp_path / "none", [], made_by={})
    with pytest.raises(DatasetError, match="unknown place"):
        read_dataset_info("gs://bucket/x")
    with pytest.raises(ValueError, match="samples_per_shard"):
        write_dataset(tmp_path / "none", [], made_by={}, samples_per_shard=0)


def test_unlike_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"sample 1 is \('encoded'"):
        write_dataset(tmp_path / "set", [small_pair(0), small_encoded(1)], made_by={})
    samples = [*map(small_encoded, range(3)), small_pair(0)]  # after whole shards, too
    with pytest.raises(DatasetError, match=r"sample 3 is \('pairs'"):
        write_dataset(tmp_path / "set", samples, made_by={}, samples_per_shard=2)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def damage_swap(path: Path) -> None:
    with tarfile.open(path, "w"):
        pass


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_flip, "not what was written: expected"),
        (damage_cut, "not what was written: expected"),
        (damage_swap, "not what was written: expected"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_damaged_shard_is_named_where_it_is_read(
    tmp_path: Path, damage: object, words: str
) -> None:
    uri = write_small(tmp_path / "set")
    damage(uri / "shard-00001.tar")  # type: ignore[operator]
    with pytest.raises(DatasetError, match=words) as raised:
        check_dataset(uri)
    assert "shard-00001.tar" in str(raised.value)
    batches = iter(loader(uri, Split(batch_size=3, shuffle=False, epochs=1)))
    assert next(batches)["key"] == ["00000000", "00000001", "00000002"]
    with pytest.raises(DatasetError, match=words) as raised:
        next(batches)
    assert "shard-00001.tar" in str(raised.value)


def test_a_manifest_of_another_version_or_damaged(tmp_path: Path) -> None:
    uri = write_small(tmp_path / "set")
    manifest = uri / "dataset.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**fields, "format_version": 99}))
    with pytest.raises(DatasetError, match="format version 99, this code reads 1"):
        read_dataset_info(uri)
    for text in ("{", "[]", json.dumps({"format_version": 1}), json.dumps({**fields, "x": 1})):
        manifest.write_text(text)
        with pytest.raises(DatasetError, match=r"dataset\.json is damaged"):
            read_dataset_info(uri)


def test_counts_that_disagree_are_named(tmp_path: Path) -> None:
    uri = write_small(tmp_path / "set")
    manifest = uri / "dataset.json"
    fields = json.loads(manifest.read_text())
    fields["shards"][0]["count"] = 4
    manifest.write_text(json.dumps(fields))
    with pytest.raises(DatasetError, match=r"shard-00000\.tar holds 3 samples, .* says 4"):
        check_dataset(uri)


def test_a_place_that_cannot_be_written_is_found_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    made = []

    def make() -> Pair:
        made.append(1)
        return small_pair(0)

    with pytest.raises(DatasetError, match="file/set"):
        write_dataset(tmp_path / "file" / "set", [make], made_by={})
    assert not made


def test_samples_are_in_their_order_under_their_numbers(tmp_path: Path) -> None:
    samples = [small_encoded(n) for n in (3, 1, 2, 0)]
    info = write_dataset(tmp_path / "set", samples, made_by={}, samples_per_shard=3)
    found = []
    for shard in info.shards:
        path = tmp_path / "set" / shard.name
        assert shard.bytes == path.stat().st_size
        with tarfile.open(path) as tar:
            assert {member.mtime for member in tar} == {0}  # the same bytes at any time
            keys = [member.name.partition(".")[0] for member in tar]
        index = index_shard(open_store(tmp_path / "set"), shard, path)
        assert [key for key, _ in index] == list(dict.fromkeys(keys))
        found += [key for key, _ in index]
    assert found == [f"{n:08d}" for n in range(4)]
    folder = ShardFolder(open_store(tmp_path / "set"), tmp_path, keep_all=False)
    for n, sample in enumerate(samples):
        key, back = folder.read(info.shards[n // 3], n % 3)
        assert (key, back.instruction) == (f"{n:08d}", sample.instruction)


def test_writing_again_removes_shards_that_are_too_many_and_nothing_else(tmp_path: Path) -> None:
    uri = write_small(tmp_path / "set")
    for name in ("notes.txt", "shard-list.txt", "other.tar"):
        (uri / name).write_text("mine")
    write_small(uri, count=2, overwrite=True)
    names = sorted(path.name for path in uri.iterdir())
    assert names == ["dataset.json", "notes.txt", "other.tar", "shard-00000.tar", "shard-list.txt"]


def test_while_it_is_written_again_it_is_no_dataset(tmp_path: Path) -> None:
    uri = write_small(tmp_path / "set")
    seen: list[bool] = []

    def sample() -> Pair:
        seen.append((uri / "dataset.json").exists())
        return small_pair(0)

    write_dataset(uri, [sample, sample], made_by={}, samples_per_shard=1, overwrite=True)
    assert seen == [False, False]
    assert read_dataset_info(uri).samples == 2


@pytest.mark.parametrize(("count", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (5, 1)])
def test_shards_hold_as_many_as_asked_for(tmp_path: Path, count: int, workers: int) -> None:
    samples = [functools.partial(small_encoded, n) for n in range(count)]
    info = write_dataset(
        tmp_path / "set", samples, made_by={}, samples_per_shard=2, workers=workers
    )
    assert [shard.count for shard in info.shards] == [2] * (count // 2) + [1] * (count % 2)
    assert info.samples == count
    assert check_dataset(tmp_path / "set") == info


def test_a_store_shows_its_files_and_no_drafts(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new" / "place")
    assert store.names() == []
    assert not store.exists("a")
    with store.scratch() as scratch:
        (scratch / "draft").write_text("content")
        (store.root / "folder").mkdir()
        assert store.names() == []
        store.put(scratch / "draft", "b")
        (scratch / "left").write_text("over")
    (store.root / "a").write_text("")
    assert store.names() == ["a", "b"]
    assert store.exists("b")
    assert not store.exists("folder")
    assert store.read("b") == b"content"
    assert store.fetch("b", tmp_path / "elsewhere") == store.root / "b"
    store.remove("b")
    store.remove("b")
    assert store.names() == ["a"]
    assert not list(store.root.glob(".*"))


def test_a_full_disk_and_a_forbidden_place_are_told_apart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(DatasetError, match=r"x: the disk is full; free space"), store.naming("x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DatasetError, match=r"/x: Permission denied; check"), store.naming("x"):
        raise OSError(errno.EACCES, "Permission denied")


def test_the_same_sample_gives_the_same_bytes_in_whatever_order_its_origin_is() -> None:
    sample = small_encoded(0)
    one, two = ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1})
    assert to_files(replace(sample, origin=one)) == to_files(replace(sample, origin=two))


def test_checking_needs_room_for_one_fetched_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = write_small(tmp_path / "set")
    held: list[int] = []

    class Counted(Far):
        def fetch(self, name: str, local: Path) -> Path:
            path = super().fetch(name, local)
            held.append(len(list(local.parent.iterdir())))
            return path

    monkeypatch.setattr(shards_module, "open_store", lambda uri: Counted(uri))
    check_dataset(uri)
    assert held == [1, 1, 1]
    assert len(list(uri.glob("*.tar"))) == 3
