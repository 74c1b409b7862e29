"""data/shard_reader.py: shards are fetched, checked, kept as long as is said, read in parts."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from data.sample import Clip
from data.shard_reader import ShardFolder, fetch_shard, index_shard
from data.shards import DatasetError, check_dataset, read_dataset_info, write_dataset
from data.store import open_store
from tests.data.conftest import Far, small_encoded, small_pair, write_small


def test_a_folder_in_a_shard_is_no_sample(tmp_path: Path) -> None:
    (shard,) = write_dataset(tmp_path / "set", [small_encoded(0)], made_by={}).shards
    path = tmp_path / "set" / shard.name
    folder = tarfile.TarInfo("notes.d")
    folder.type = tarfile.DIRTYPE
    with tarfile.open(path, "a") as tar:
        tar.addfile(folder)
    index = index_shard(open_store(tmp_path / "set"), shard, path)
    assert [key for key, _ in index] == ["00000000"]


def test_a_sample_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    uri = tmp_path / "set"
    write_dataset(uri, [small_encoded(0), small_encoded(1)], made_by={})
    info = read_dataset_info(uri)
    shard = info.shards[0]
    path = uri / shard.name
    folder = ShardFolder(open_store(uri), tmp_path, keep_all=True)
    folder.read(shard, 0)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"\x93NUMPY")
    data[place : place + 6] = b"zeroes"
    path.write_bytes(data)  # after it was checked, as a failing disk would
    with pytest.raises(DatasetError, match=r"sample 00000001 of shard-00000\.tar cannot be"):
        folder.read(shard, 1)


def test_a_folder_keeps_what_it_is_told_and_forgets_the_rest(tmp_path: Path) -> None:
    uri = tmp_path / "set"
    info = write_dataset(uri, [small_encoded(n) for n in range(3)], made_by={}, samples_per_shard=1)
    folder = ShardFolder(open_store(uri), tmp_path, keep_all=False)
    for shard in info.shards:
        folder.read(shard, 0)
    folder.keep({info.shards[1].name})
    assert list(folder.open) == [info.shards[1].name]
    assert check_dataset(uri) == info  # of a folder nothing is deleted
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # and nothing made beside it


def test_what_was_fetched_damaged_is_fetched_again(tmp_path: Path) -> None:
    shard = read_dataset_info(write_small(tmp_path / "set")).shards[0]
    whole = tmp_path / "set" / shard.name
    data = whole.read_bytes()
    whole.write_bytes(data[:-1] + b"x")
    store, cache = Far(tmp_path / "set"), tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(DatasetError, match="is not what was written"):
        fetch_shard(store, shard, cache)
    whole.write_bytes(data)
    assert fetch_shard(store, shard, cache).read_bytes() == data


@pytest.mark.parametrize("keep_all", [True, False])
def test_shards_of_a_cache_stay_and_others_are_let_go_of(tmp_path: Path, keep_all: bool) -> None:
    info = read_dataset_info(write_small(tmp_path / "set"))
    (tmp_path / "cache").mkdir()
    folder = ShardFolder(Far(tmp_path / "set"), tmp_path / "cache", keep_all)
    for shard in info.shards:
        folder.keep({shard.name})
        folder.read(shard, 0)
    kept = [path.stem for path in (tmp_path / "cache").rglob("*.tar")]
    assert sorted(kept) == sorted(s.sha256 for s in info.shards[0 if keep_all else -1 :])


def test_of_a_clip_s_pair_nothing_else_is_read(tmp_path: Path) -> None:
    """Which takes a fifth of reading the pair."""
    uri = tmp_path / "set"
    (shard,) = write_dataset(uri, [small_pair(0)], made_by={}).shards
    folder = ShardFolder(open_store(uri), tmp_path, keep_all=True)
    for only in (("json", "target.mp4"), ("json",)):
        with folder._files(shard, 0, only) as (key, files):
            assert (key, set(files)) == ("00000000", set(only))
    with folder._files(shard, 0) as (_, files):
        assert set(files) == {"json", "source.mp4", "target.mp4", "mask.mp4"}
    key, clip = folder.read_clip(shard, 0, "source", 1, 3)
    assert (key, type(clip), clip.frames.shape) == ("00000000", Clip, (3, 32, 48, 3))
