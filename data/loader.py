"""Batches out of shards: deterministic, split over ranks and workers, exact to resume.

Every epoch has one order of all samples, known from the seed and `dataset.json` alone. Each rank
takes an equal stretch of it and each worker a stretch of that, so any number of shards serves any
number of ranks, all ranks get equally many batches, and a position is two numbers. (Dealing out
whole shards, as WebDataset's own splitters do, needs as many shards as workers and leaves ranks
with unequal counts, on which collectives hang.)
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from data.manifest import DatasetInfo, dataset_hash, read_dataset_info
from data.processes import adopt_environment, worker_context
from data.sample import Clip, EncodedPair, Pair
from data.shard_reader import ShardFolder
from data.store import open_store
from infra.runtime.environment import everything
from infra.runtime.errors import UserError

# Shards whose samples are mixed with each other; so many lie on the local disk at a time.
MIXED_SHARDS = 4

Batch = dict[str, Any]
Keyed = tuple[str, Pair | EncodedPair | Clip]  # a sample and its key


@dataclass(frozen=True)
class Split:
    """Which samples a reader gets, in which order and how many at a time.

    `epochs` None goes on for ever, in full batches. A number reads each sample that often, but for
    the `samples % world_size` of an epoch that cannot be shared out equally; the last batch of a
    worker may be smaller, and is so on every rank.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    workers: int = 0  # processes; 0 reads in the caller's
    shuffle: bool = True
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                "need batch_size >= 1, workers >= 0 and 0 <= rank < world_size, got batch_size "
                f"{self.batch_size}, workers {self.workers}, rank {self.rank} of {self.world_size}"
            )
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, or None for ever, got {self.epochs}")

    def of(self, info: DatasetInfo) -> dict[str, Any]:
        """What a position means nothing without."""
        places = {name: getattr(self, name) for name in PLACES}
        return {"dataset": dataset_hash(info), **places}


PLACES = ("seed", "shuffle", "rank", "world_size", "workers")


def loader(
    uri: str | Path,
    split: Split,
    *,
    state: dict[str, Any] | None = None,
    cache: str | Path | None = None,
    clip_frames: int | None = None,
) -> Loader:
    """Iterable of batches of a dataset.

    A batch of pairs holds source and target uint8 `[B, F, H, W, 3]`, mask bool `[B, F, H, W]`; an
    encoded one source and target `[B, F, 16, h, w]` and text `[B, L, D]`, all float32. With
    `clip_frames` a batch of pairs holds `clip` instead, uint8 `[B, clip_frames, H, W, 3]`: any
    stretch of each pair's source or target, another one each epoch. All hold `instruction` and
    `key`, lists of B strings.

    Args:
        state: What `state_dict()` gave, to go on after that batch.
        cache: Folder that keeps the shards read from S3 (as large as the dataset). Without it each
            worker holds MIXED_SHARDS of them and downloads again every epoch.

    Raises:
        DatasetError: an unusable dataset; at once for `dataset.json`, when a shard is first opened
            for a shard that is missing or changed.
        UserError: an impossible split or clip, or a state of another dataset or split; at once.
    """
    return Loader(uri, split, state, cache, clip_frames)


class Loader:
    """See `loader`. `info` is the dataset's; `state_dict` and `load_state_dict` are exact."""

    def __init__(
        self,
        uri: str | Path,
        split: Split,
        state: dict[str, Any] | None,
        cache: str | Path | None,
        clip_frames: int | None,
    ) -> None:
        self.info, workers = read_dataset_info(uri), split.workers
        if self.info.samples < split.world_size * max(1, workers):
            raise UserError(
                f"{uri}: {self.info.samples} samples cannot be split over {split.world_size} ranks "
                f"with {max(1, workers)} workers each; use fewer, or a larger dataset"
            )
        if clip_frames is not None and clip_frames > self.info.frames:
            raise UserError(
                f"clip_frames={clip_frames}, but the clips of {uri} have {self.info.frames} "
                f"frames; set clip_frames to {self.info.frames} or less"
            )
        self._of = split.of(self.info)
        self._dataset = dataset = _Stretch(uri, self.info, split, cache, clip_frames)
        with warnings.catch_warnings():
            # torchdata 0.11 calls what torch 2.13 deprecates; nothing that a user could do about.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            self._loader = StatefulDataLoader(
                dataset,
                batch_size=split.batch_size,
                num_workers=workers,
                collate_fn=_collate,
                multiprocessing_context=worker_context() if workers else None,
                worker_init_fn=functools.partial(adopt_environment, everything()),
                generator=torch.Generator().manual_seed(split.seed),  # leaves torch's own alone
            )
        if state is not None:
            self.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch given last; picklable, a few hundred bytes a worker.

        After the last batch of `epochs` it is that of a new start.
        """
        return {"of": dict(self._of), "loader": self._loader.state_dict()}

    def goes_on_from(self, state: dict[str, Any]) -> bool:
        """Whether `state` is of a loader with the same split, so that going on is exact."""
        places = ("rank", "world_size", "workers")
        return all(state["of"].get(name) == self._of[name] for name in places)

    def skip(self, epochs: float) -> None:
        """Makes the next iteration begin where `epochs` (1.25 is a quarter into the second) of the
        samples were read by a loader with another split: of the epoch that is under way some
        samples come twice and as many not at all."""
        self._dataset.skipped = epochs

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration go on after `state`.

        Raises:
            UserError: the state is of another dataset, seed or split.
        """
        for name, value in self._of.items():
            if state["of"].get(name) != value:
                raise UserError(
                    f"the loader's state was saved with {name} {state['of'].get(name)!r}, now it "
                    f"is {value!r}; resume with the same dataset, seed and workers, or start "
                    "without a state"
                )
        self._loader.load_state_dict(state["loader"])


class _Stretch(IterableDataset[Keyed]):
    """One rank's part of a dataset; each worker process iterates over its own part of that."""

    def __init__(
        self,
        uri: str | Path,
        info: DatasetInfo,
        split: Split,
        cache: str | Path | None,
        clip_frames: int | None,
    ) -> None:
        self.store, self.info, self.split = open_store(uri), info, split
        self.clip_frames = clip_frames
        self.skipped = 0.0  # epochs
        self.cached = cache is not None
        self.folder = Path(cache or tempfile.gettempdir())
        if self.cached:
            self.folder.mkdir(parents=True, exist_ok=True)
        elif self.store.remote:
            # Belongs to the process that reads the batches: however a worker ends, it is removed.
            self.downloads = tempfile.TemporaryDirectory(prefix="liveedit-shards-")
            self.folder = Path(self.downloads.name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "downloads"}

    def shards(self) -> ShardFolder:
        return ShardFolder(self.store, self.folder, self.cached)

    def __iter__(self) -> _Reader:
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        each = self.info.samples // self.split.world_size
        begin = self.split.rank * each + each * index // count
        end = self.split.rank * each + each * (index + 1) // count
        return _Reader(self, begin, end)


class _Reader:
    """Iterator over samples `begin..end` of every epoch's order."""

    def __init__(self, stretch: _Stretch, begin: int, end: int) -> None:
        self.of, self.begin, self.end = stretch, begin, end
        self.epoch = int(stretch.skipped)
        # Samples of this epoch already given.
        self.position = round((stretch.skipped - self.epoch) * (end - begin))
        self.samples = self._read()
        self.folder = stretch.shards()

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> Keyed:
        return next(self.samples)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Before the first sample is asked for, where `_read` looks where to begin."""
        self.epoch, self.position = state["epoch"], state["position"]

    def _read(self) -> Iterator[Keyed]:
        epochs = self.of.split.epochs
        while epochs is None or self.epoch < epochs:
            passed = 0
            for group in self._groups():
                size = sum(last - first for _, first, last in group)
                if passed + size > self.position:
                    order = self._order(group, passed)
                    shards = {number for number, _ in order}
                    self.folder.keep({self.of.info.shards[n].name for n in shards})
                    for number, row in order[self.position - passed :]:
                        sample = self._sample(number, row)
                        # Counted before it is given: the state is asked for after it was taken.
                        self.position += 1
                        yield sample
                passed += size
            self.epoch, self.position = self.epoch + 1, 0

    def _sample(self, number: int, row: int) -> Keyed:
        of, shard = self.of, self.of.info.shards[number]
        if of.clip_frames is None:
            return self.folder.read(shard, row)
        # By where the sample lies, so that it does not matter who reads it.
        rng = np.random.default_rng([of.split.seed, self.epoch, number, row])
        video = ("source", "target")[rng.integers(2)]
        first = int(rng.integers(of.info.frames - of.clip_frames + 1))
        return self.folder.read_clip(shard, row, video, first, of.clip_frames)

    def _groups(self) -> list[list[tuple[int, int, int]]]:
        """This epoch's pieces (shard, first row, end), MIXED_SHARDS to a group."""
        counts = [shard.count for shard in self.of.info.shards]
        total, order, shift = sum(counts), np.arange(len(counts)), 0
        if self.of.split.shuffle:
            rng = np.random.default_rng([self.of.split.seed, self.epoch])
            order = rng.permutation(len(counts))
            # Move the cuts between ranks, so that none is tied to the same rows of few shards.
            shift = int(rng.integers(total))
        pieces = []
        for begin, end in _unwrapped(self.begin + shift, self.end + shift, total):
            start = 0
            for number in order.tolist():
                first, last = max(begin - start, 0), min(end - start, counts[number])
                if first < last:
                    pieces.append((number, first, last))
                start += counts[number]
        return [pieces[i : i + MIXED_SHARDS] for i in range(0, len(pieces), MIXED_SHARDS)]

    def _order(self, group: list[tuple[int, int, int]], passed: int) -> list[tuple[int, int]]:
        rows = [(number, row) for number, first, last in group for row in range(first, last)]
        if self.of.split.shuffle:
            rng = np.random.default_rng([self.of.split.seed, self.epoch, self.begin, passed])
            rows = [rows[i] for i in rng.permutation(len(rows))]
        return rows


def _unwrapped(begin: int, end: int, total: int) -> list[tuple[int, int]]:
    """A stretch of a circle of `total` as one or two stretches of a line."""
    begin, end = begin % total, begin % total + end - begin
    return [(begin, end)] if end <= total else [(begin, total), (0, end - total)]


def _collate(samples: list[Keyed]) -> Batch:
    batch: Batch = {
        "key": [key for key, _ in samples],
        "instruction": [sample.instruction for _, sample in samples],
    }
    if isinstance(samples[0][1], Clip):
        batch["clip"] = torch.from_numpy(np.stack([clip.frames for _, clip in samples]))  # type: ignore[union-attr]
        return batch
    encoded = isinstance(samples[0][1], EncodedPair)
    for name in ("source", "target", "text") if encoded else ("source", "target", "mask"):
        stacked = torch.from_numpy(np.stack([getattr(sample, name) for _, sample in samples]))
        batch[name] = stacked.float() if encoded else stacked
    return batch
