"""data/ingest.py, processes.py: many processes, on from where it stopped, one bad file apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data.ingest import JOURNAL, Ingested, _crashed, _fingerprint, _read_journal, ingest
from data.manifest import dataset_hash
from data.pairs import PairList
from data.processes import map_in_order
from data.shards import DatasetError, check_dataset
from data.store import open_store
from tests.data.conftest import S3Server, edited_middle, numbered, write_raw
from tests.data.workers import crash_at_five


def make_list(folder: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    """`count` pairs with an instruction of their own; of the `bad` ones the edit is missing."""
    frames = numbered(12)
    write_raw(folder / "a.mp4", frames)
    write_raw(folder / "b.mp4", edited_middle(frames))
    entries = [
        {
            "instruction": f"edit number {n}",
            "source_path": "a.mp4",
            "edited_path": "gone.mp4" if n in bad else "b.mp4",
        }
        for n in range(count)
    ]
    path = folder / "pairs.json"
    path.write_text(json.dumps(entries))
    return path


def pairs(path: Path) -> PairList:
    return PairList(path, fps=16, frames=9, height=32, width=48)


def test_work_comes_back_in_order_past_one_that_ends_its_process() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(12):
            read.append(item)
            yield item

    results, ahead = [], []
    for result in map_in_order(crash_at_five, items(), 2, crashed=lambda item: -item):
        results.append(result)
        ahead.append(len(read) - len(results))
    assert results == [n * n if n != 5 else -5 for n in range(12)]
    assert max(ahead) == 4, "two for each worker"


@pytest.mark.parametrize("workers", [0, 2])
def test_usable_pairs_become_a_dataset_and_the_others_are_named(
    tmp_path: Path, workers: int
) -> None:
    seen: list[tuple[int, int, int]] = []

    def note(at: Ingested) -> None:
        seen.append((at.done, at.kept, len(at.left_out)))

    info, left_out = ingest(
        pairs(make_list(tmp_path, 7, bad=(2, 5))),
        str(tmp_path / "set"),
        samples_per_shard=2,
        work=partial(map_in_order, workers=workers),
        on_entry=note,
    )
    assert (info.samples, len(info.shards), info.frames) == (5, 3, 9)
    assert [entry.index for entry in left_out] == [2, 5]
    assert info.made_by == {"ingest": "pairs.json", "left_out": 2}
    assert seen[-1] == (7, 5, 2)
    assert [done for done, _, _ in seen] == list(range(8))
    check_dataset(tmp_path / "set")
    assert not (tmp_path / "set" / JOURNAL).exists()


class StoppedError(Exception):
    pass


def stop_after(entries: int) -> Any:
    def note(at: Ingested) -> None:
        if at.done == entries:
            raise StoppedError

    return note


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    path = make_list(tmp_path, 9, bad=(1,))
    whole, _ = ingest(pairs(path), str(tmp_path / "whole"), samples_per_shard=3)
    with pytest.raises(StoppedError):
        ingest(pairs(path), str(tmp_path / "set"), samples_per_shard=3, on_entry=stop_after(6))
    first = (tmp_path / "set" / "shard-00000.tar").stat().st_mtime_ns
    starts: list[int] = []

    def note(at: Ingested) -> None:
        starts.append(at.done)

    again, left_out = ingest(pairs(path), str(tmp_path / "set"), samples_per_shard=3, on_entry=note)
    assert starts[0] == 4  # the first shard holds entries 0, 2 and 3
    assert [entry.index for entry in left_out] == [1]
    assert (tmp_path / "set" / "shard-00000.tar").stat().st_mtime_ns == first
    assert dataset_hash(again) == dataset_hash(whole)


@pytest.mark.parametrize("change", ["list", "settings", "shard"])
def test_a_stopped_run_of_something_else_begins_anew(tmp_path: Path, change: str) -> None:
    path = make_list(tmp_path, 6)
    uri = str(tmp_path / "set")
    with pytest.raises(StoppedError):
        ingest(pairs(path), uri, samples_per_shard=2, on_entry=stop_after(4))
    size = 2
    if change == "list":
        path = make_list(tmp_path, 5)
    elif change == "settings":
        size = 3
    else:
        (tmp_path / "set" / "shard-00000.tar").unlink()
    starts: list[int] = []
    info, _ = ingest(
        pairs(path), uri, samples_per_shard=size, on_entry=lambda at: starts.append(at.done)
    )
    assert starts[0] == 0
    assert info.samples == (5 if change == "list" else 6)
    check_dataset(uri)


def test_a_run_goes_on_only_from_one_of_the_same_list_and_settings(tmp_path: Path) -> None:
    path, other = make_list(tmp_path, 2), tmp_path / "other.json"
    other.write_text(path.read_text().replace("number 1", "number 2"))
    settings = {"fps": 16, "frames": 9, "height": 32, "width": 48}
    changes = {"fps": 8, "frames": 5, "height": 48, "width": 32}
    prints = [_fingerprint(PairList(list_, **settings), 2) for list_ in (path, other)]
    prints += [_fingerprint(PairList(path, **settings | {k: v}), 2) for k, v in changes.items()]
    prints.append(_fingerprint(PairList(path, **settings), 3))
    assert len(set(prints)) == len(prints)
    assert prints[0] == _fingerprint(PairList(path, **settings), 2)


def test_overwriting_begins_anew(tmp_path: Path) -> None:
    path, uri = make_list(tmp_path, 3), str(tmp_path / "set")
    journals: list[bytes] = []

    def note(at: Ingested) -> None:
        if (tmp_path / "set" / JOURNAL).exists():
            journals.append((tmp_path / "set" / JOURNAL).read_bytes())

    ingest(pairs(path), uri, samples_per_shard=1, on_entry=note)
    # As a machine leaves it that is lost after the dataset is finished and before the end.
    (tmp_path / "set" / JOURNAL).write_bytes(journals[-1])
    with pytest.raises(DatasetError, match=r"finished dataset already.*\(--overwrite\)"):
        ingest(pairs(path), uri)
    starts: list[int] = []
    ingest(
        pairs(path),
        uri,
        samples_per_shard=1,
        overwrite=True,
        on_entry=lambda at: starts.append(at.done),
    )
    assert starts[0] == 0


def test_when_nothing_is_usable_the_reasons_are_given(tmp_path: Path) -> None:
    path = make_list(tmp_path, 4, bad=range(4))
    with pytest.raises(DatasetError, match=r"no pair of .*entry 0: .*gone\.mp4: no such") as no:
        ingest(pairs(path), str(tmp_path / "set"))
    assert [f"entry {n}" in str(no.value) for n in range(4)] == [True, True, True, False]


def test_it_goes_on_in_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    path, uri = make_list(tmp_path, 4), f"s3://{s3.bucket}/real"
    with pytest.raises(StoppedError):
        ingest(pairs(path), uri, samples_per_shard=2, on_entry=stop_after(3))
    starts: list[int] = []
    info, _ = ingest(
        pairs(path), uri, samples_per_shard=2, on_entry=lambda at: starts.append(at.done)
    )
    assert starts[0] == 2
    assert info.samples == 4
    assert JOURNAL not in open_store(uri).names()


def test_a_run_that_goes_on_tells_what_was_done_before(tmp_path: Path) -> None:
    """Of nine entries one was left out among the first four, which are a shard of three."""
    path, uri = make_list(tmp_path, 9, bad=(1, 7)), str(tmp_path / "set")
    with pytest.raises(StoppedError):
        ingest(pairs(path), uri, samples_per_shard=3, on_entry=stop_after(6))
    seen: list[tuple[int, int, int, int]] = []

    def note(at: Ingested) -> None:
        seen.append((at.done, at.kept, len(at.left_out), at.resumed))

    info, left_out = ingest(pairs(path), uri, samples_per_shard=3, on_entry=note)
    assert seen == [
        (4, 3, 1, 4), (5, 4, 1, 4), (6, 5, 1, 4), (7, 6, 1, 4), (8, 6, 2, 4), (9, 7, 2, 4),
    ]  # fmt: skip
    assert [(left.index, Path(left.path).name) for left in left_out] == [
        (1, "gone.mp4"), (7, "gone.mp4"),
    ]  # fmt: skip
    assert "no such file" in left_out[0].reason
    assert info.made_by == {"ingest": "pairs.json", "left_out": 2}
    assert [shard.count for shard in info.shards] == [3, 3, 1]


def test_a_run_that_goes_on_may_find_nothing_more(tmp_path: Path) -> None:
    path, uri = make_list(tmp_path, 4, bad=(2, 3)), str(tmp_path / "set")
    with pytest.raises(StoppedError):
        ingest(pairs(path), uri, samples_per_shard=2, on_entry=stop_after(2))
    info, left_out = ingest(pairs(path), uri, samples_per_shard=2)
    assert (info.samples, info.frames, len(left_out)) == (2, 9, 2)


def test_a_journal_says_all_that_going_on_needs(tmp_path: Path) -> None:
    path, uri = make_list(tmp_path, 4, bad=(0,)), tmp_path / "set"
    with pytest.raises(StoppedError):
        ingest(pairs(path), str(uri), samples_per_shard=2, on_entry=stop_after(4))
    print_of_all = _fingerprint(pairs(path), 2)
    found = _read_journal(open_store(uri), print_of_all)
    said = json.loads((uri / JOURNAL).read_text())
    assert (found.fingerprint, found.entries, found.like) == (
        print_of_all, 3, ("pairs", 16.0, (9, 32, 48)),
    )  # fmt: skip
    assert [(shard.name, shard.count) for shard in found.shards] == [("shard-00000.tar", 2)]
    assert [left.index for left in found.left_out] == [0]
    assert said["fingerprint"] == print_of_all


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"source_path": "a.mp4", "edited_path": "b.mp4"}, "a.mp4, b.mp4"),
        ({"source_path": "a.mp4"}, "a.mp4"), ({"edited_path": 3}, ""), ("text", ""), (None, ""),
    ],
)  # fmt: skip
def test_an_entry_that_takes_its_process_down_is_named_whatever_it_says(
    tmp_path: Path, entry: Any, named: str
) -> None:
    """Which entries name files is found out in the process that ended."""
    read = pairs(make_list(tmp_path, 1)).read
    left = _crashed(read, (7, entry))
    assert (left.index, left.path) == (7, named or str(tmp_path / "pairs.json"))
    assert "ended the process" in left.reason


def test_without_a_word_for_it_a_crash_is_the_pool_s_error() -> None:
    with pytest.raises(BrokenProcessPool):
        list(map_in_order(crash_at_five, [5], 1))
