"""Datasets: WebDataset tar shards beside a `dataset.json`, in a folder or an S3 prefix.

`dataset.json` is written last and holds the SHA-256 of every shard: without it a dataset is
unfinished, and a shard that differs from it is refused.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import webdataset

from data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    DatasetInfo,
    Shard,
    dataset_hash,
    read_dataset_info,
)
from data.processes import worker_context
from data.sample import EncodedPair, Pair, to_files
from data.shard_reader import fetch_shard, index_shard
from data.store import DatasetError, Store, open_store

__all__ = [
    "DatasetError",
    "DatasetInfo",
    "Shard",
    "check_dataset",
    "dataset_hash",
    "read_dataset_info",
    "write_dataset",
]

Sample = Pair | EncodedPair


def write_dataset(
    uri: str | Path,
    samples: Iterable[Sample | Callable[[], Sample]],
    *,
    made_by: dict[str, Any],
    samples_per_shard: int = 16,
    workers: int = 0,
    overwrite: bool = False,
) -> DatasetInfo:
    """Writes samples, in their order, as shards and then `dataset.json`.

    Args:
        uri: A folder or `s3://bucket/prefix`. What an interrupted write left there is replaced.
        samples: Pairs or encoded pairs, all of one kind, shape and rate; or functions without
            arguments that make them (`functools.partial(make_pair, seed)`), called in the workers.
        made_by: JSON values to remember.
        workers: Processes that make and encode samples ; 0 does it here.
        overwrite: Replace a finished dataset; without it that is an error.

    Raises:
        DatasetError: nothing to write, unlike samples, a finished dataset in the way, or a place
            that cannot be written, which is found out before the first sample is made.
    """
    if samples_per_shard < 1 or workers < 0:
        raise ValueError(
            f"samples_per_shard must be at least 1 and workers at least 0, "
            f"got {samples_per_shard} and {workers}"
        )
    store = open_store(uri)
    old = store.names()
    if MANIFEST in old:
        if not overwrite:
            raise DatasetError(
                f"{uri}: holds a finished dataset already; write elsewhere, delete it, "
                "or pass overwrite=True"
            )
        store.remove(MANIFEST)
    first: _Encoded | None = None
    shards: list[Shard] = []
    total = 0
    with store.scratch() as scratch:
        for batch in _batches(_encode_all(samples, workers), samples_per_shard):
            for encoded in batch:
                first = first or encoded
                if encoded.like != first.like:
                    raise DatasetError(
                        f"{uri}: sample {total} is {encoded.like}, sample 0 is {first.like} "
                        "(kind, fps, frames/height/width); resample them to one shape"
                    )
                total += 1
            shards.append(_write_shard(store, scratch, len(shards), total - len(batch), batch))
        if first is None:
            raise DatasetError(f"{uri}: there is no sample to write; see what was left out and why")
        for name in set(old) - {s.name for s in shards}:
            if name.startswith("shard-") and name.endswith(".tar"):
                store.remove(name)
        kind, fps, (frames, height, width) = first.like
        info = DatasetInfo(
            FORMAT_VERSION, kind, total, fps, frames, height, width, tuple(shards), made_by
        )
        manifest = scratch / MANIFEST
        with store.naming(MANIFEST):
            manifest.write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")
        store.put(manifest, MANIFEST)
    return info


def check_dataset(uri: str | Path) -> DatasetInfo:
    """Reads every shard, compares it with its checksum, and counts its samples.

    Raises:
        DatasetError: the first shard that is missing, changed or incomplete, by name.
    """
    info, store = read_dataset_info(uri), open_store(uri)
    with tempfile.TemporaryDirectory() as folder:
        for shard in info.shards:
            path = fetch_shard(store, shard, Path(folder))
            index_shard(store, shard, path)
            if store.remote:
                path.unlink()
    return info


@dataclass(frozen=True)
class _Encoded:
    files: dict[str, bytes]
    like: tuple[str, float, tuple[int, int, int]]  # what all samples of a dataset share


def _encode(item: Sample | Callable[[], Sample]) -> _Encoded:
    sample = item if isinstance(item, Pair | EncodedPair) else item()
    kind = "encoded" if isinstance(sample, EncodedPair) else "pairs"
    return _Encoded(to_files(sample), (kind, sample.fps, sample.video_shape))


def _encode_all(
    samples: Iterable[Sample | Callable[[], Sample]], workers: int
) -> Iterator[_Encoded]:
    if workers == 0:
        yield from map(_encode, samples)
        return
    with ProcessPoolExecutor(workers, mp_context=worker_context()) as pool:
        waiting: deque[Future[_Encoded]] = deque()
        try:
            for item in samples:
                waiting.append(pool.submit(_encode, item))
                if len(waiting) > 2 * workers:  # bounds the memory, keeps the order
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _batches(items: Iterable[_Encoded], size: int) -> Iterator[list[_Encoded]]:
    batch: list[_Encoded] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_shard(
    store: Store, scratch: Path, number: int, first_key: int, batch: list[_Encoded]
) -> Shard:
    name = f"shard-{number:05d}.tar"
    path = scratch / name
    with store.naming(name):
        # A fixed time: the same samples give the same bytes, and so the same dataset hash.
        with (
            path.open("wb") as file,
            webdataset.TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for offset, encoded in enumerate(batch):
                tar.write({"__key__": f"{first_key + offset:08d}", **encoded.files})
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        shard = Shard(name, len(batch), path.stat().st_size, digest)
    store.put(path, name)
    return shard
