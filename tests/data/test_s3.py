"""Datasets on S3, against a real server that the test starts."""

from __future__ import annotations

import functools
import gc
import pickle
import socket
import tempfile
from pathlib import Path
from typing import Any

import botocore.exceptions as boto
import pytest
import s3fs
import torch

from data.loader import Split, loader
from data.shards import (
    DatasetError,
    check_dataset,
    dataset_hash,
    read_dataset_info,
    write_dataset,
)
from data.store import open_store, s3_buckets
from tests.data.conftest import S3Server, point_at, small_encoded, small_pair, start_s3

COUNT = 7


def write(uri: str, **options: Any) -> str:
    samples = [small_encoded(n) for n in range(COUNT)]
    write_dataset(uri, samples, made_by={}, samples_per_shard=2, **options)
    return uri


@pytest.fixture
def uri(s3: S3Server, request: pytest.FixtureRequest) -> str:
    name = request.node.name.replace("[", "-").replace("]", "")
    return write(f"s3://{s3.bucket}/tests/{name}")


def keys(batches: Any) -> list[int]:
    return [int(key) for batch in batches for key in batch["key"]]


def test_the_server_is_a_real_one(s3: S3Server, tmp_path: Path) -> None:
    # What the other tests stand on: multipart uploads, ranges, and signatures that are checked.
    content = bytes(range(256)) * 4096 * 11
    (tmp_path / "big").write_bytes(content)
    files = s3fs.S3FileSystem()
    files.put_file(str(tmp_path / "big"), f"{s3.bucket}/big", chunksize=5 * 2**20)
    assert files.info(f"{s3.bucket}/big")["ETag"].strip('"').endswith("-3")
    assert files.cat_file(f"{s3.bucket}/big", start=1000, end=1300) == content[1000:1300]
    files.get_file(f"{s3.bucket}/big", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == content
    stranger = s3fs.S3FileSystem(key="liveedit-test", secret="not the secret at all")
    with pytest.raises(PermissionError):
        stranger.cat_file(f"{s3.bucket}/big")


def test_bucket_and_folder_hold_the_same_dataset(uri: str, tmp_path: Path) -> None:
    write(str(tmp_path / "set"))
    here, there = read_dataset_info(tmp_path / "set"), read_dataset_info(uri)
    assert dataset_hash(here) == dataset_hash(there)
    assert check_dataset(uri) == there
    local = list(loader(tmp_path / "set", Split(batch_size=2, epochs=2)))
    remote = list(loader(uri, Split(batch_size=2, epochs=2)))
    assert keys(local) == keys(remote)
    assert all(torch.equal(a["source"], b["source"]) for a, b in zip(local, remote, strict=True))


def test_pairs_are_written_by_processes_and_read_by_workers(s3: S3Server) -> None:
    place = f"s3://{s3.bucket}/tests/pairs"
    samples = [functools.partial(small_pair, n) for n in range(4)]
    write_dataset(place, samples, made_by={}, samples_per_shard=1, workers=2)
    ranks = [
        loader(place, Split(batch_size=1, rank=r, world_size=2, workers=2, epochs=1))
        for r in range(2)
    ]
    assert sorted(keys(ranks[0]) + keys(ranks[1])) == [0, 1, 2, 3]


def test_resume_is_exact(uri: str) -> None:
    whole = loader(uri, Split(batch_size=2, seed=3))
    iterator = iter(whole)
    for _ in range(3):
        next(iterator)
    resumed = iter(loader(uri, Split(batch_size=2, seed=3), state=whole.state_dict()))
    assert keys(next(resumed) for _ in range(5)) == keys(next(iterator) for _ in range(5))


def test_an_iterator_outlives_its_loader(uri: str) -> None:
    batches = iter(loader(uri, Split(batch_size=1, shuffle=False, epochs=1)))
    gc.collect()
    assert keys(batches) == list(range(COUNT))


def test_who_stops_in_the_middle_leaves_nothing_on_the_disk(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    batches = iter(loader(uri, Split(batch_size=1, epochs=1)))
    next(batches)
    assert [path.name[:16] for path in tmp_path.iterdir()] == ["liveedit-shards-"]
    del batches
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_cache_holds_each_shard_once(uri: str, s3: S3Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = keys(loader(uri, Split(batch_size=1, epochs=1), cache=cache))
    info = read_dataset_info(uri)
    assert {p.name for p in cache.iterdir()} == {f"{s.sha256}.tar" for s in info.shards}
    s3fs.S3FileSystem().rm(uri.removeprefix("s3://") + "/shard-00000.tar")
    assert keys(loader(uri, Split(batch_size=1, epochs=1), cache=cache)) == first


def test_a_damaged_cache_is_refused_and_mended(uri: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    list(loader(uri, Split(batch_size=1, epochs=1), cache=cache))
    shard = cache / f"{read_dataset_info(uri).shards[1].sha256}.tar"
    shard.write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"shard-00001\.tar is not what was written"):
        list(loader(uri, Split(batch_size=1, epochs=1), cache=cache))
    assert len(keys(loader(uri, Split(batch_size=1, epochs=1), cache=cache))) == COUNT


def test_downloads_do_not_pile_up(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    most = 0
    batches = loader(uri, Split(batch_size=1, epochs=3, shuffle=False))
    for _ in batches:
        most = max(most, len(list(tmp_path.rglob("*.tar"))))
    assert 1 <= most <= 4
    # Left in the middle, with a worker that has shards open.
    batches = loader(uri, Split(batch_size=1, workers=1))
    next(iter(batches))
    assert list(tmp_path.rglob("*.tar"))
    del batches
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_changed_missing_and_cut_off(uri: str) -> None:
    files, prefix = s3fs.S3FileSystem(), uri.removeprefix("s3://")
    content = files.cat_file(f"{prefix}/shard-00002.tar")
    files.pipe_file(f"{prefix}/shard-00002.tar", content[:-1] + b"x")
    with pytest.raises(DatasetError, match=r"shard-00002\.tar is not what was written"):
        check_dataset(uri)
    files.rm(f"{prefix}/shard-00002.tar")
    with pytest.raises(DatasetError, match=r"shard-00002\.tar: no such bucket or object"):
        list(loader(uri, Split(batch_size=1, epochs=1, shuffle=False)))
    files.rm(f"{prefix}/dataset.json")
    with pytest.raises(DatasetError, match=r"cut off while being written \(3 shards"):
        read_dataset_info(uri)
    write(uri)
    assert check_dataset(uri).samples == COUNT


def never() -> Any:
    raise AssertionError("no sample may be made for a place that cannot be written")


def refused(words: str, uri: str) -> None:
    """Both ways in fail alike, before any work."""
    for attempt in (
        lambda: read_dataset_info(uri),
        lambda: write_dataset(uri, [never], made_by={}),
        lambda: loader(uri, Split(batch_size=1)),
    ):
        with pytest.raises(DatasetError, match=words) as raised:
            attempt()
        assert uri.split("/x")[0] in str(raised.value)


def test_a_missing_bucket_is_named(s3: S3Server) -> None:
    refused("no such bucket", "s3://no-such-bucket/x")


def test_no_dataset_in_the_bucket(s3: S3Server) -> None:
    with pytest.raises(DatasetError, match="no dataset here"):
        read_dataset_info(f"s3://{s3.bucket}/nothing/here")
    with pytest.raises(DatasetError, match="names no bucket"):
        read_dataset_info("s3://")


@pytest.mark.parametrize(("key", "secret"), [("liveedit-test", "wrong" * 5), ("who", "x" * 20)])
def test_wrong_keys_are_denied(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, key: str, secret: str
) -> None:
    point_at(s3.endpoint, monkeypatch, key=key, secret=secret)
    refused("access denied .* check AWS_ACCESS_KEY_ID", f"s3://{s3.bucket}/x")


def test_no_keys_are_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(s3.endpoint, monkeypatch, key=None)
    refused("no S3 credentials; set AWS_ACCESS_KEY_ID", f"s3://{s3.bucket}/x")


def test_an_unreachable_server_is_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    point_at(endpoint, monkeypatch)
    refused(f"S3 at {endpoint} does not answer .* check AWS_ENDPOINT_URL", f"s3://{s3.bucket}/x")


def test_a_server_that_dies_is_named_and_forgiven_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_s3(tmp_path / "one")
    try:
        point_at(server.endpoint, monkeypatch)
        place = write(f"s3://{server.bucket}/set")
        batches = loader(place, Split(batch_size=2, shuffle=False))
        next(iter(batches))
        state = batches.state_dict()
    finally:
        server.process.kill()
        server.process.wait(10)
    with pytest.raises(DatasetError, match="does not answer"):
        next(iter(loader(place, Split(batch_size=2, shuffle=False))))
    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path / "two").mkdir()
    back = start_s3(tmp_path / "two" / "root")
    try:
        point_at(back.endpoint, monkeypatch)
        write(f"s3://{back.bucket}/set")
        assert keys(
            [next(iter(loader(place, Split(batch_size=2, shuffle=False), state=state)))]
        ) == [2, 3]
    finally:
        back.process.terminate()
        back.process.wait(10)
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_is_a_store_like_a_folder(s3: S3Server, tmp_path: Path) -> None:
    store = open_store(f"s3://{s3.bucket}/tests/verbs/")
    assert store.remote
    assert store.uri == f"s3://{s3.bucket}/tests/verbs"
    assert store.names() == []
    assert not store.exists("a")
    for name in ("b", "a"):
        with store.scratch() as scratch:
            (scratch / "draft").write_text(f"content of {name}")
            store.put(scratch / "draft", name)
            assert not list(scratch.iterdir())
        assert not scratch.exists()
    assert store.names() == ["a", "b"]
    assert store.exists("a")
    assert store.read("a") == b"content of a"
    local = tmp_path / "local"
    assert store.fetch("a", local) == local
    assert local.read_text() == "content of a"
    local.write_text("kept")
    assert store.fetch("a", local).read_text() == "kept"  # downloaded once
    assert list(tmp_path.iterdir()) == [local]
    there = pickle.loads(pickle.dumps(store))  # as it goes to a worker
    assert there.names() == ["a", "b"]
    store.remove("a")
    assert store.names() == ["b"]
    with pytest.raises(DatasetError, match=r"verbs/a: no such bucket or object"):
        store.fetch("a", tmp_path / "other")
    assert list(tmp_path.iterdir()) == [local]


def test_the_endpoint_of_s3_alone_is_the_one_that_is_named(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = open_store("s3://bucket/x")
    with (
        pytest.raises(DatasetError, match=r"bucket/x/a: S3 at http://127\.0\.0\.1:9 does not"),
        store.naming("a"),
    ):
        raise OSError("no answer")


def test_what_another_process_writes_is_seen_at_once(s3: S3Server, uri: str) -> None:
    store, other = open_store(uri), s3fs.S3FileSystem(skip_instance_cache=True)
    place = uri.removeprefix("s3://")
    before = store.names()
    other.pipe_file(f"{place}/new.json", b"{}")
    assert store.names() == sorted([*before, "new.json"])
    assert store.exists("new.json")
    other.rm_file(f"{place}/new.json")
    assert store.names() == before
    assert not store.exists("new.json")


def test_a_silent_server_is_given_up_after_the_seconds_that_are_said(s3: S3Server) -> None:
    store: Any = open_store(f"s3://{s3.bucket}/x")
    files = store.files
    config = files.connect().meta.config
    assert (config.connect_timeout, config.read_timeout) == (4, 10)
    assert config.retries["total_max_attempts"] == 3
    assert (files.retries, files.dircache.use_listings_cache) == (2, False)
    assert store.files is files
    sent = pickle.dumps(store)
    s3fs.S3FileSystem.clear_instance_cache()  # as there is none in a worker yet
    assert pickle.loads(sent).files.retries == 2


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (FileNotFoundError("gone"), r"set/a: no such bucket or object \(gone\); make the bucket"),
        (PermissionError("no"), r"set/a: access denied \(no\); check AWS_ACCESS_KEY_ID"),
        (boto.NoCredentialsError(), "set/a: no S3 credentials; set AWS_ACCESS_KEY_ID"),
        (boto.PartialCredentialsError(provider="p", cred_var="v"), "set/a: no S3 credentials"),
        (boto.EndpointConnectionError(endpoint_url="u"), r"S3 at AWS does not .*\(EndpointConnec"),
        (boto.ClientError({}, "get"), r"S3 at AWS does not answer as it should \(ClientError"),
        (TimeoutError("late"), r"S3 at AWS does not answer as it should \(TimeoutError: late"),
    ],
)
def test_whatever_s3_answers_names_the_object_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    store = open_store("s3://bucket/set")
    with pytest.raises(DatasetError, match=f"^s3://bucket/.*{said}"), store.naming("a"):
        raise raised


def test_buckets_are_listed_for_who_may_and_others_are_told_apart(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert s3_buckets() == [s3.bucket]
    point_at(s3.endpoint, monkeypatch, secret="wrong" * 5)
    with pytest.raises(DatasetError, match="S3: access denied"):
        s3_buckets()

    def refused(*_: Any) -> Any:
        raise PermissionError("no") from RuntimeError("An error occurred (AccessDenied)")

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", refused)
    assert s3_buckets() is None  # keys that are right, of one bucket alone


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (FileNotFoundError(2, "No such file"), "/set: a is missing; write or copy the dataset"),
        (FileExistsError(17, "File exists"), "/set/a: a file is in the way; choose another"),
        (NotADirectoryError(20, "Not a directory"), "/set/a: a file is in the way"),
        (OSError(30, "Read-only file system"), "/set/a: Read-only file system; check the folder"),
        (OSError("bare"), "/set/a: bare; check the folder's rights, or choose another"),
    ],
)
def test_whatever_a_folder_answers_names_the_file_and_the_remedy(
    raised: OSError, said: str
) -> None:
    with pytest.raises(DatasetError, match=said), open_store("/set").naming("a"):
        raise raised
    with pytest.raises(DatasetError, match=r"^/set: a file is in"), open_store("/set").naming(""):
        raise FileExistsError(17, "File exists")
