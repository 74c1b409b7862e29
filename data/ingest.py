"""Real pairs into a dataset: on many processes or machines, and on from where it stopped.

Beside the shards lies `ingest.json` until all is done: what has been written and left out, and of
which list. A run that finds it goes on after the last whole shard; one with another list or other
settings begins anew. The result is the same bytes either way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from data.manifest import DatasetInfo, Shard
from data.pairs import PATHS, LeftOut, PairList, PairReader
from data.processes import map_in_order
from data.shards import Encoded, ShardWriter, encode, finished_dataset
from data.store import DatasetError, Store, open_store

JOURNAL = "ingest.json"
VERSION = 1  # of what is made of a pair: another one begins anew

Task = tuple[int, Any]  # place in the list, entry
Result = Encoded | LeftOut


class Mapper(Protocol):
    """Something that works through tasks in their order; `map_in_order` with its workers is one."""

    def __call__(
        self, function: Callable[[Task], Result], items: Iterable[Task], *,
        crashed: Callable[[Task], Result],
    ) -> Iterator[Result]: ...  # fmt: skip


HERE = partial(map_in_order, workers=0)


@dataclass
class Ingested:
    """How far an ingest is; entries of the list."""

    done: int = 0
    kept: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    resumed: int = 0  # done by an earlier run


def ingest(
    pairs: PairList,
    uri: str,
    *,
    samples_per_shard: int = 16,
    overwrite: bool = False,
    work: Mapper = HERE,
    on_entry: Callable[[Ingested], None] = lambda progress: None,
) -> tuple[DatasetInfo, list[LeftOut]]:
    """Writes the usable pairs of a list; `on_entry` hears of every entry that is done.

    Raises:
        DatasetError: a finished dataset is in the way, the place cannot be written, or no pair is
            usable (its message has the first reasons).
    """
    store = open_store(uri)
    if finished_dataset(store, uri, overwrite) and store.exists(JOURNAL):
        store.remove(JOURNAL)
    print_of_all = _fingerprint(pairs, samples_per_shard)
    journal = _read_journal(store, print_of_all)
    progress = Ingested(
        done=journal.entries,
        kept=sum(shard.count for shard in journal.shards),
        left_out=list(journal.left_out),
        resumed=journal.entries,
    )
    on_entry(progress)
    tasks = list(enumerate(pairs.entries))[journal.entries :]
    with store.scratch() as scratch:
        writer = ShardWriter(
            uri, store, scratch, samples_per_shard, shards=journal.shards, like=journal.like
        )
        results = work(partial(_encoded, pairs.read), tasks, crashed=partial(_crashed, pairs.read))
        for (index, _), result in zip(tasks, results, strict=True):
            progress.done += 1
            if isinstance(result, LeftOut):
                progress.left_out.append(result)
            else:
                progress.kept += 1
                if writer.add(result):
                    done = _Journal(
                        print_of_all,
                        index + 1,
                        tuple(writer.shards),
                        writer.like,
                        tuple(progress.left_out),
                    )
                    store.write(scratch, JOURNAL, json.dumps(asdict(done)))
            on_entry(progress)
        if not progress.kept:
            first = "; ".join(map(str, progress.left_out[:3]))
            raise DatasetError(f"{uri}: no pair of {pairs.path} is usable: {first}")
        made_by = {"ingest": pairs.path.name, "left_out": len(progress.left_out)}
        info = writer.finish(made_by)
    store.remove(JOURNAL)
    return info, progress.left_out


def _encoded(read: PairReader, task: Task) -> Result:
    """Runs in the workers: a pair as the files of a shard."""
    pair = read(*task)
    return pair if isinstance(pair, LeftOut) else encode(pair)


def _crashed(read: PairReader, task: Task) -> LeftOut:
    index, entry = task
    # What the entry holds has not been looked at here: the process that would have is gone.
    paths = [entry.get(key) for key in PATHS] if isinstance(entry, dict) else []
    names = ", ".join(path for path in paths if isinstance(path, str)) or str(read.list_path)
    return LeftOut(index, names, "reading it ended the process that did: out of memory, or a crash")


@dataclass(frozen=True)
class _Journal:
    fingerprint: str
    entries: int = 0  # of the list, that are done with
    shards: tuple[Shard, ...] = ()
    like: tuple[str, float, tuple[int, int, int]] | None = None
    left_out: tuple[LeftOut, ...] = ()


def _fingerprint(pairs: PairList, samples_per_shard: int) -> str:
    settings = [VERSION, pairs.read.fps, pairs.read.frames, pairs.read.size, samples_per_shard]
    return hashlib.sha256(json.dumps([settings, pairs.entries]).encode()).hexdigest()


def _read_journal(store: Store, fingerprint: str) -> _Journal:
    if not store.exists(JOURNAL):
        return _Journal(fingerprint)
    said = json.loads(store.read(JOURNAL))
    if said.get("fingerprint") != fingerprint:
        return _Journal(fingerprint)
    shards = tuple(Shard(**shard) for shard in said["shards"])
    present = set(store.names())
    if not all(shard.name in present for shard in shards):
        return _Journal(fingerprint)
    kind, fps, shape = said["like"]
    return _Journal(
        fingerprint,
        said["entries"],
        shards,
        (kind, fps, tuple(shape)),
        tuple(LeftOut(**entry) for entry in said["left_out"]),
    )
