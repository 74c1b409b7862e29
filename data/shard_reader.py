"""Shards out of a store: fetched, compared with their checksums, read sample by sample."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from data.manifest import MANIFEST, Shard
from data.sample import Clip, EncodedPair, Pair, clip_from_files, from_files
from data.store import DatasetError, Store

# Keys of a shard in order, each with (offset, size) of its members by extension.
Index = list[tuple[str, dict[str, tuple[int, int]]]]


def fetch_shard(store: Store, shard: Shard, folder: Path) -> Path:
    """A local file that holds the shard and has passed its checksum.

    On disk that is the shard itself; from S3 it is downloaded to `folder`, named by its checksum,
    or taken from there. SHA-256 costs about 0.6 s a gigabyte.

    Raises:
        DatasetError: names shard, expected and found, and what to do.
    """
    path = store.fetch(shard.name, folder / f"{shard.sha256}.tar")
    with store.naming(shard.name):
        size = path.stat().st_size
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        if store.remote:
            path.unlink()  # a damaged download must not be taken for the shard next time
        raise DatasetError(
            f"{store.uri}: {shard.name} is not what was written: expected {shard.bytes} bytes with "
            f"sha256 {shard.sha256[:16]}..., found {size} bytes with {found[:16]}...; "
            "copy the shard again from its origin or write the dataset again"
        )
    return path


def index_shard(store: Store, shard: Shard, path: Path) -> Index:
    """Keys of a shard in order, each with (offset, size) of its members by extension."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if member.isfile() and key is not None:
                    members.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DatasetError(f"{store.uri}: {shard.name} is no tar file ({error})") from error
    if len(members) != shard.count:
        raise DatasetError(
            f"{store.uri}: {shard.name} holds {len(members)} samples, {MANIFEST} says "
            f"{shard.count}; write the dataset again"
        )
    return list(members.items())


class ShardFolder:
    """Verified shards on the local disk and the samples in them."""

    def __init__(self, store: Store, folder: Path, keep_all: bool) -> None:
        self.store, self.keep_all = store, keep_all
        # Shards that will be deleted again are no other worker's business.
        own = store.remote and not keep_all
        self.folder = Path(tempfile.mkdtemp(dir=folder)) if own else folder
        self.open: dict[str, tuple[Path, Index]] = {}

    def keep(self, names: set[str]) -> None:
        """Forgets the shards that are not needed any more, and deletes what was downloaded."""
        for name in set(self.open) - names:
            path, _ = self.open.pop(name)
            if self.store.remote and not self.keep_all:
                path.unlink()

    def fetch(self, shard: Shard) -> None:
        """Has the shard here, and checked, before it is read; one thread at a time may."""
        if shard.name not in self.open:
            path = fetch_shard(self.store, shard, self.folder)
            self.open[shard.name] = (path, index_shard(self.store, shard, path))

    def read(self, shard: Shard, row: int) -> tuple[str, Pair | EncodedPair]:
        with self._files(shard, row) as (key, files):
            return key, from_files(files)

    def read_clip(
        self, shard: Shard, row: int, video: str, first: int, count: int
    ) -> tuple[str, Clip]:
        """See `data.sample.clip_from_files`."""
        with self._files(shard, row, ("json", f"{video}.mp4")) as (key, files):
            return key, clip_from_files(files, video, first, count)

    @contextmanager
    def _files(
        self, shard: Shard, row: int, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """A sample's key and members by extension; what fails while they are decoded names it."""
        self.fetch(shard)
        path, index = self.open[shard.name]
        key, members = index[row]
        with self.store.naming(shard.name), path.open("rb") as file:
            files = {}
            for extension, (offset, size) in members.items():
                if only is None or extension in only:
                    file.seek(offset)
                    files[extension] = file.read(size)
        try:
            yield key, files
        except (KeyError, ValueError) as error:
            raise DatasetError(
                f"{self.store.uri}: sample {key} of {shard.name} cannot be decoded "
                f"({type(error).__name__}: {error}); write the dataset again"
            ) from error
