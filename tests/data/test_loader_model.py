"""The loader against plain lists: who reads what in which epoch, and what comes after any pause."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import fields, replace
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from data import loader as module
from data.loader import Split, loader
from data.manifest import DatasetInfo, Shard, dataset_hash, read_dataset_info
from data.sample import EncodedPair
from data.shards import write_dataset

QUICK = settings(
    max_examples=25,
    deadline=None,
    stateful_step_count=25,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # making a failure smaller takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def numbered(number: int, of: int = 0) -> EncodedPair:
    """A sample whose every part holds its number."""
    rows = np.full((1, 1, 1, 1), number + 100.0 * of, np.float32)
    return EncodedPair(
        source=rows,
        target=rows + 0.25,
        text=rows[0, 0] + 0.5,
        instruction=f"number {number}",
        fps=16.0,
        video_shape=(1, 8, 8),
    )


@functools.cache
def dataset(root: Path, samples: int, per_shard: int) -> str:
    uri = root / f"{samples}-by-{per_shard}"
    made = [numbered(n) for n in range(samples)]
    write_dataset(uri, made, made_by={}, samples_per_shard=per_shard)
    return str(uri)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbered")


def numbers(batch: dict[str, Any]) -> list[int]:
    """The samples of a batch, whose parts must all be of the same ones."""
    found = batch["source"].flatten()
    for name, more in (("target", 0.25), ("text", 0.5)):
        assert torch.equal(batch[name].flatten(), found + more), name
    listed = [int(number) for number in found]
    assert batch["key"] == [f"{number:08d}" for number in listed]
    assert batch["instruction"] == [f"number {number}" for number in listed]
    return listed


def epochs_of(uri: str, count: int, monkeypatch: Any, worker: Any = None, **options: Any) -> Any:
    """What one worker of one rank reads in each of `count` epochs: a list of lists."""
    monkeypatch.setattr(module, "get_worker_info", lambda: worker)
    most = count * read_dataset_info(uri).samples
    batches = iter(loader(uri, Split(batch_size=1, epochs=count, **options)))
    flat = [n for batch in islice(batches, most) for n in numbers(batch)]
    assert next(batches, None) is None, "an epoch too many"
    each = len(flat) // count
    return [flat[i * each : (i + 1) * each] for i in range(count)]


@QUICK
@given(
    samples=st.integers(1, 14),
    per_shard=st.integers(1, 5),
    world=st.integers(1, 4),
    workers=st.integers(1, 3),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_ranks_and_workers_share_every_epoch(
    root: Path, samples: int, per_shard: int, world: int, workers: int, seed: int, shuffle: bool
) -> None:
    if samples < world * workers:
        return
    uri = dataset(root, samples, per_shard)
    with pytest.MonkeyPatch.context() as patch:
        parts = [
            epochs_of(
                uri,
                3,
                patch,
                SimpleNamespace(id=worker, num_workers=workers),
                rank=rank,
                world_size=world,
                seed=seed,
                shuffle=shuffle,
            )
            for rank in range(world)
            for worker in range(workers)
        ]
    for epoch in range(3):
        ranks = [
            [n for part in parts[rank * workers : (rank + 1) * workers] for n in part[epoch]]
            for rank in range(world)
        ]
        assert {len(rank) for rank in ranks} == {samples // world}  # all equally many
        sizes = {len(part[epoch]) for part in parts}
        assert max(sizes) - min(sizes) <= 1
        seen = [n for rank in ranks for n in rank]
        assert len(set(seen)) == len(seen) == samples - samples % world
        assert set(seen) <= set(range(samples))
        if not shuffle:
            assert seen == list(range(len(seen)))


def test_epochs_ranks_and_seeds_have_orders_of_their_own(root: Path, monkeypatch: Any) -> None:
    uri = dataset(root, 40, 5)
    orders: dict[Any, list[int]] = {}
    for seed in range(3):
        for rank in range(2):
            read = epochs_of(uri, 6, monkeypatch, rank=rank, world_size=2, seed=seed)
            orders |= {(seed, rank, epoch): order for epoch, order in enumerate(read)}
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert len({frozenset(order) for order in orders.values()}) == len(orders)  # not only mixed
    steps = [b - a for order in orders.values() for a, b in pairwise(order)]
    assert np.mean(np.array(steps) == 1) < 0.15  # neighbours are torn apart
    shards = [[n // 5 for n in order] for order in orders.values()]
    runs = [sum(a != b for a, b in pairwise(order)) for order in shards]
    assert np.mean(runs) > 10  # of 19 steps; 3 if the shards came one after the other


def test_no_more_shards_are_held_than_are_mixed(root: Path, monkeypatch: Any) -> None:
    uri = dataset(root, 40, 2)
    held: list[int] = []
    read = module.ShardFolder.read

    def noting(self: Any, shard: Shard, row: int) -> Any:
        sample = read(self, shard, row)
        held.append(len(self.open))
        return sample

    monkeypatch.setattr(module.ShardFolder, "read", noting)
    (order,) = epochs_of(uri, 1, monkeypatch)
    assert len(order) == 40
    assert max(held) == 4


class Reading(RuleBasedStateMachine):
    """A rank's loader that is stopped, copied and resumed in any way, against the list of batches
    that an undisturbed one gives. States are pickled, as a checkpoint does."""

    root: Path

    @initialize(
        shape=st.sampled_from([(7, 2), (12, 5), (5, 5), (9, 1)]),
        world=st.integers(1, 3),
        rank=st.integers(0, 2),
        batch=st.integers(1, 4),
        seed=st.integers(0, 2),
        epochs=st.sampled_from([None, None, 1, 3]),
        shuffle=st.booleans(),
    )
    def begin(self, shape: Any, world: int, rank: int, batch: int, seed: int, **more: Any) -> None:
        self.uri = dataset(self.root, *shape)
        self.options = {
            "batch_size": batch,
            "rank": rank % world,
            "world_size": world,
            "seed": seed,
        }
        self.options |= more
        undisturbed = iter(loader(self.uri, Split(**self.options)))
        self.wanted: list[list[int]] = []
        for given_batch in undisturbed:
            self.wanted.append(numbers(given_batch))
            if len(self.wanted) == 60:
                break
        self.saved: list[tuple[int, bytes]] = []
        self.loader = loader(self.uri, Split(**self.options))
        self.stream, self.at = iter(self.loader), 0

    @precondition(lambda self: self.at < len(self.wanted))
    @rule()
    def read(self) -> None:
        assert numbers(next(self.stream)) == self.wanted[self.at]
        self.at += 1

    @precondition(lambda self: self.at == len(self.wanted) < 60)
    @rule()
    def end(self) -> None:
        with pytest.raises(StopIteration):
            next(self.stream)
        self.stream, self.at = iter(self.loader), 0  # a further pass is a new start

    @precondition(lambda self: self.at < len(self.wanted))
    @rule()
    def save(self) -> None:
        self.saved.append((self.at, pickle.dumps(self.loader.state_dict())))

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), how=st.sampled_from(["made", "loaded", "into this"]))
    def resume(self, data: Any, how: str) -> None:
        self.at, pickled = data.draw(st.sampled_from(self.saved))
        state = pickle.loads(pickled)
        before = copy.deepcopy(state)
        if how == "made":
            self.loader = loader(self.uri, Split(**self.options), state=state)
        else:
            if how == "loaded":
                self.loader = loader(self.uri, Split(**self.options))
            self.loader.load_state_dict(state)
        assert str(state) == str(before)
        self.stream = iter(self.loader)


def test_any_pause_goes_on_where_it_was(root: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Reading.root = root
    run_state_machine_as_test(Reading, settings=QUICK)


def test_a_dataset_of_equal_size_and_other_content_is_refused(root: Path, tmp_path: Path) -> None:
    other = [numbered(n, of=1) for n in range(7)]
    write_dataset(tmp_path / "other", other, made_by={}, samples_per_shard=2)
    state = loader(dataset(root, 7, 2), Split(batch_size=1)).state_dict()
    a, b = read_dataset_info(dataset(root, 7, 2)), read_dataset_info(tmp_path / "other")
    assert [(s.name, s.count, s.bytes) for s in a.shards] == [
        (s.name, s.count, s.bytes) for s in b.shards
    ]
    with pytest.raises(ValueError, match=r"saved with dataset .*; resume with the same data"):
        loader(tmp_path / "other", Split(batch_size=1), state=state)


INFO = DatasetInfo(
    format_version=1,
    kind="pairs",
    samples=5,
    fps=16.0,
    frames=9,
    height=32,
    width=48,
    shards=(Shard("a.tar", 3, 1000, "aa"), Shard("b.tar", 2, 900, "bb")),
    made_by={"tool": "x"},
)


@pytest.mark.parametrize("name", [entry.name for entry in fields(DatasetInfo)])
def test_the_hash_is_of_all_but_who_made_it(name: str) -> None:
    value = getattr(INFO, name)
    changed = {str: "other", int: 7, float: 7.5, tuple: INFO.shards[::-1], dict: {"tool": "y"}}
    other = replace(INFO, **{name: changed[type(value)]})
    assert (dataset_hash(other) == dataset_hash(INFO)) == (name == "made_by")
    assert dataset_hash(replace(INFO)) == dataset_hash(INFO)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", [entry.name for entry in fields(Shard)])
def test_the_hash_is_of_every_shards_checksum(number: int, name: str) -> None:
    shards = list(INFO.shards)
    other: Any = "cc" if name in ("name", "sha256") else 5
    shards[number] = replace(shards[number], **{name: other})
    assert dataset_hash(replace(INFO, shards=tuple(shards))) != dataset_hash(INFO)


Rows = list[tuple[int, int]]  # (shard, row)


def mixed(
    rank: int, ranks: int, counts: tuple[int, ...], shuffle: bool = True
) -> list[tuple[Rows, Rows]]:
    """A rank's first epoch, group by group: its rows one after the other, and as they are read."""
    shards = tuple(Shard(f"shard-{n:05d}.tar", count, 1, "") for n, count in enumerate(counts))
    info = DatasetInfo(1, "encoded", sum(counts), 16.0, 1, 8, 8, shards, {})
    split = Split(batch_size=1, rank=rank, world_size=ranks, shuffle=shuffle)
    reader = iter(module._Stretch("none", info, split, None, None))
    passed = 0
    orders: list[tuple[Rows, Rows]] = []
    for group in reader._groups():
        rows = [(n, row) for n, first, last in group for row in range(first, last)]
        orders.append((rows, reader._order(group, passed)))
        passed += len(rows)
    return orders


def test_four_shards_are_mixed_with_each_other() -> None:
    groups = mixed(0, 1, (1,) * 9, shuffle=False)
    assert [rows for rows, _ in groups] == [order for _, order in groups]
    assert [rows for rows, _ in groups] == [
        [(n, 0) for n in range(first, min(first + 4, 9))] for first in (0, 4, 8)
    ]


def test_each_group_of_shards_and_each_rank_mixes_its_rows_its_own_way() -> None:
    """As they would not with one seed for all: then as many rows are always mixed alike."""
    ways = [
        tuple(rows.index(row) for row in order)
        for rank in (0, 1)
        for rows, order in mixed(rank, 2, (4,) * 40)
        if len(rows) == 16
    ]
    assert len(set(ways)) == len(ways) >= 6


def test_the_order_of_a_seed_is_the_one_that_it_always_was() -> None:
    """A saved position is one in this order: in another, what goes on reads samples twice."""
    found = [
        [shard * 3 + row for _, order in mixed(rank, 2, (3,) * 10) for shard, row in order]
        for rank in (0, 1)
    ]
    assert found == [
        [24, 17, 1, 28, 29, 26, 15, 27, 0, 25, 2, 16, 4, 5, 3],
        [22, 23, 12, 20, 14, 8, 7, 13, 18, 21, 6, 19, 9, 10, 11],
    ]
