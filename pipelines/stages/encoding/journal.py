"""How far an encoding is, beside its shards until it is finished: a run that finds the journal of
the same work goes on after the last whole shard."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from data.manifest import Shard
from data.shards import ShardWriter
from data.store import Store

JOURNAL = "encode.json"


class Journal:
    """`work` are the JSON values that decide what is written; of other work nothing is taken."""

    def __init__(self, store: Store, work: dict[str, Any]) -> None:
        self.store, self.work = store, work
        self.shards: tuple[Shard, ...] = ()
        self.like: tuple[str, float, tuple[int, int, int]] | None = None
        self.asked: Counter[str] = Counter()  # instructions of the samples in `shards`
        said = json.loads(store.read(JOURNAL)) if store.exists(JOURNAL) else {}
        shards = tuple(Shard(**shard) for shard in said.get("shards", ()))
        if said.get("work") == work and {shard.name for shard in shards} <= set(store.names()):
            kind, fps, shape = said["like"]
            self.shards, self.like = shards, (kind, fps, tuple(shape))
            self.asked = Counter(said["asked"])

    def keep(self, scratch: Path, writer: ShardWriter) -> None:
        """After every shard that `writer` has put into the store."""
        shards = [vars(shard) for shard in writer.shards]
        said = {"work": self.work, "shards": shards, "like": writer.like, "asked": self.asked}
        self.store.write(scratch, JOURNAL, json.dumps(said))

    def remove(self) -> None:
        """When the dataset is finished."""
        if self.store.exists(JOURNAL):
            self.store.remove(JOURNAL)
