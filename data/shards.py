"""Datasets: WebDataset tar shards beside a `dataset.json`, in a folder or an S3 prefix.

`dataset.json` is written last and holds the SHA-256 of every shard: without it a dataset is
unfinished, and a shard that differs from it is refused.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
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
from data.processes import map_in_order
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
    finished_dataset(store, uri, overwrite)
    with store.scratch() as scratch:
        writer = ShardWriter(uri, store, scratch, samples_per_shard)
        for encoded in map_in_order(encode, samples, workers):
            writer.add(encoded)
        return writer.finish(made_by)


def finished_dataset(store: Store, uri: str | Path, overwrite: bool) -> bool:
    """Whether one was there; its manifest is removed. Raises DatasetError without `overwrite`."""
    if MANIFEST not in store.names():  # which also finds out that there is no such place
        return False
    if not overwrite:
        raise DatasetError(
            f"{uri}: holds a finished dataset already; write elsewhere, delete it, "
            "or overwrite it (--overwrite)"
        )
    store.remove(MANIFEST)
    return True


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
class Encoded:
    """A sample as the files of a shard."""

    files: dict[str, bytes]
    like: tuple[str, float, tuple[int, int, int]]  # what all samples of a dataset share


def encode(item: Sample | Callable[[], Sample]) -> Encoded:
    sample = item if isinstance(item, Pair | EncodedPair) else item()
    kind = "encoded" if isinstance(sample, EncodedPair) else "pairs"
    return Encoded(to_files(sample), (kind, sample.fps, sample.video_shape))


class ShardWriter:
    """Collects samples into shards of a store, and writes the manifest at the end.

    `shards` and `like` are what an earlier writer had written, to go on after it.
    """

    def __init__(
        self,
        uri: str | Path,
        store: Store,
        scratch: Path,
        samples_per_shard: int,
        *,
        shards: Iterable[Shard] = (),
        like: tuple[str, float, tuple[int, int, int]] | None = None,
    ) -> None:
        self.uri, self.store, self.scratch = uri, store, scratch
        self.samples_per_shard = samples_per_shard
        self.shards, self.like = list(shards), like
        self.total = sum(shard.count for shard in self.shards)
        self._batch: list[Encoded] = []

    def add(self, encoded: Encoded) -> bool:
        """True when a shard has just been written. Raises DatasetError for an unlike sample."""
        self.like = self.like or encoded.like
        if encoded.like != self.like:
            raise DatasetError(
                f"{self.uri}: sample {self.total + len(self._batch)} is {encoded.like}, sample 0 "
                f"is {self.like} (kind, fps, frames/height/width); resample them to one shape"
            )
        self._batch.append(encoded)
        if len(self._batch) < self.samples_per_shard:
            return False
        self._write_batch()
        return True

    def finish(self, made_by: dict[str, Any]) -> DatasetInfo:
        """Writes the last shard and the manifest, and removes shards of what was there before."""
        if self._batch:
            self._write_batch()
        if self.like is None:
            raise DatasetError(
                f"{self.uri}: there is no sample to write; see what was left out and why"
            )
        for name in set(self.store.names()) - {shard.name for shard in self.shards}:
            if name.startswith("shard-") and name.endswith(".tar"):
                self.store.remove(name)
        kind, fps, (frames, height, width) = self.like
        shards = tuple(self.shards)
        info = DatasetInfo(
            FORMAT_VERSION, kind, self.total, fps, frames, height, width, shards, made_by
        )
        self.store.write(self.scratch, MANIFEST, json.dumps(asdict(info), indent=1) + "\n")
        return info

    def _write_batch(self) -> None:
        number = len(self.shards)
        self.shards.append(_write_shard(self.store, self.scratch, number, self.total, self._batch))
        self.total += len(self._batch)
        self._batch = []


def _write_shard(
    store: Store, scratch: Path, number: int, first_key: int, batch: list[Encoded]
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
