"""data/loader.py: every sample once, the same order always, exact resume on any split."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import Split, loader
from data.sample import Pair, clip_from_files, to_files
from data.shards import DatasetError, write_dataset
from infra.runtime.environment import become, everything, variable
from infra.runtime.errors import UserError
from tests.data.conftest import small_encoded, small_pair

COUNT = 11


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven encoded samples in four shards of 3, 3, 3 and 2."""
    uri = tmp_path_factory.mktemp("encoded") / "set"
    samples = [small_encoded(n) for n in range(COUNT)]
    write_dataset(uri, samples, made_by={}, samples_per_shard=3)
    return uri


def keys(batches: Any) -> list[list[int]]:
    return [[int(key) for key in batch["key"]] for batch in batches]


def flat(batches: Any) -> list[int]:
    return [key for batch in keys(batches) for key in batch]


def take(iterable: Any, count: int) -> list[Any]:
    iterator = iter(iterable)
    return [next(iterator) for _ in range(count)]


def test_pairs_are_decoded(tmp_path: Path) -> None:
    pairs = [small_pair(n) for n in range(3)]
    write_dataset(tmp_path / "set", pairs, made_by={}, samples_per_shard=2)
    (batch,) = list(loader(tmp_path / "set", Split(batch_size=3, shuffle=False, epochs=1)))
    for name in ("source", "target"):
        assert batch[name].shape == (3, 5, 32, 48, 3)
        assert batch[name].dtype == torch.uint8
    assert batch["mask"].dtype == torch.bool
    assert batch["instruction"] == [p.instruction for p in pairs]
    for row, pair in zip(batch["mask"], pairs, strict=True):
        assert torch.equal(row, torch.from_numpy(pair.mask))


def levels(n: int) -> Pair:
    """A pair whose frames are of one grey each, 4 a frame, the target's 100 more."""
    source = np.empty((9, 16, 16, 3), np.uint8)
    source[:] = 4 * np.arange(9)[:, None, None, None]
    return Pair(source, source + np.uint8(100), np.ones((9, 16, 16), bool), f"pair {n}", 16.0)


def drawn(uri: Path, epochs: int, **split: Any) -> list[tuple[int, int, int]]:
    """(pair, 1 for its target, first frame) of each clip of 5 frames."""
    found = []
    for batch in loader(uri, Split(batch_size=2, epochs=epochs, **split), clip_frames=5):
        assert set(batch) == {"clip", "key", "instruction"}
        assert batch["clip"].dtype == torch.uint8
        assert batch["clip"].shape == (2, 5, 16, 16, 3)
        for clip, key, said in zip(batch["clip"], batch["key"], batch["instruction"], strict=True):
            greys = clip.double().mean(dim=(1, 2, 3))
            target, first = divmod(round(greys[0].item()) + 1, 100)  # coding moves one by 1
            first //= 4
            expected = 100 * target + 4 * (first + torch.arange(5))
            torch.testing.assert_close(greys, expected.double(), atol=1.5, rtol=0)
            assert said == f"pair {int(key)}"
            found.append((int(key), target, first))
    return found


def test_clips_are_any_stretch_of_either_video_and_others_each_epoch(tmp_path: Path) -> None:
    write_dataset(uri := tmp_path / "set", map(levels, range(6)), made_by={}, samples_per_shard=4)
    found = drawn(uri, 12)
    assert {clip[1:] for clip in found} == {(t, f) for t in (0, 1) for f in range(5)}
    assert len(set(found)) > 36  # of 60
    for epoch in range(12):
        assert {n for n, _, _ in found[6 * epoch : 6 * epoch + 6]} == set(range(6))
    assert sum(target for _, target, _ in found) / len(found) == pytest.approx(0.5, abs=0.12)
    first, other = (drawn(uri, 1, seed=seed, shuffle=False) for seed in (0, 1))
    assert [n for n, _, _ in first] == [n for n, _, _ in other]
    assert first != other
    # The first of either shard, epoch by epoch.
    assert [clip[1:] for clip in found if clip[0] == 0] != [c[1:] for c in found if c[0] == 4]
    # Who reads a pair does not matter.
    shared = [clip for rank in (0, 1, 2) for clip in drawn(uri, 1, rank=rank, world_size=3)]
    assert sorted(shared) == sorted(found[:6])


def test_clips_go_on_after_a_state(tmp_path: Path) -> None:
    write_dataset(uri := tmp_path / "set", map(levels, range(6)), made_by={}, samples_per_shard=4)
    first = loader(uri, Split(batch_size=2), clip_frames=5)
    stream = iter(first)
    for _ in range(4):  # into the second epoch
        next(stream)
    state = first.state_dict()
    again = iter(loader(uri, Split(batch_size=2), state=state, clip_frames=5))
    for _ in range(4):
        assert torch.equal(next(again)["clip"], next(stream)["clip"])


def test_a_clip_longer_than_the_pairs_is_refused(tmp_path: Path) -> None:
    write_dataset(uri := tmp_path / "set", [levels(0)], made_by={}, samples_per_shard=4)
    next(iter(loader(uri, Split(batch_size=1), clip_frames=9)))
    with pytest.raises(UserError, match=r"clip_frames=10, .*set have 9 frames; .* to 9 or less"):
        loader(uri, Split(batch_size=1), clip_frames=10)


def test_a_clip_reads_one_video_alone() -> None:
    files = to_files(levels(0))
    del files["mask.mp4"], files["source.mp4"]
    assert clip_from_files(files, "target", 4, 5).frames.mean() == pytest.approx(124, abs=1)
    with pytest.raises(KeyError, match="source"):
        clip_from_files(files, "source", 4, 5)
    with pytest.raises(ValueError, match=r"target from frame 5 on is \(4, 16, 16\), .*\(5, 16"):
        clip_from_files(files, "target", 5, 5)


def test_encoded_samples_are_float32(encoded: Path) -> None:
    batch = next(iter(loader(encoded, Split(batch_size=2, shuffle=False))))
    shapes = {name: tuple(batch[name].shape) for name in ("source", "target", "text")}
    assert shapes == {
        "source": (2, 2, 16, 4, 6),
        "target": (2, 2, 16, 4, 6),
        "text": (2, 24, 8),
    }
    assert all(batch[name].dtype == torch.float32 for name in shapes)
    assert torch.equal(batch["source"][1], torch.from_numpy(small_encoded(1).source))
    assert batch["instruction"] == ["edit number 0", "edit number 1"]


def test_without_shuffle_the_order_is_that_of_the_dataset(encoded: Path) -> None:
    batches = keys(loader(encoded, Split(batch_size=4, shuffle=False, epochs=1)))
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own(encoded: Path) -> None:
    order = flat(loader(encoded, Split(batch_size=COUNT, epochs=3)))
    epochs = [order[i : i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order == flat(loader(encoded, Split(batch_size=COUNT, epochs=3)))
    assert order != flat(loader(encoded, Split(batch_size=COUNT, epochs=3, seed=1)))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many samples in one shard."""
    uri = tmp_path_factory.mktemp("single") / "set"
    write_dataset(uri, [small_encoded(n) for n in range(COUNT)], made_by={})
    return uri


def test_rows_are_mixed_otherwise_in_every_epoch(single: Path) -> None:
    """And not only begun elsewhere."""
    order = flat(loader(single, Split(batch_size=COUNT, epochs=4)))
    first, *others = (order[i : i + COUNT] for i in range(0, 4 * COUNT, COUNT))
    for epoch in others:
        turned = {(there - here) % COUNT for here, there in zip(first, epoch, strict=True)}
        assert len(turned) > 1


def test_a_rank_is_not_tied_to_the_same_rows(single: Path) -> None:
    reads = flat(loader(single, Split(batch_size=5, world_size=2, epochs=4)))
    parts = {frozenset(reads[i : i + 5]) for i in range(0, 20, 5)}
    assert len(parts) > 2


def test_a_cache_is_made_wherever_it_is_to_be(single: Path, tmp_path: Path) -> None:
    for _ in range(2):  # and may be there
        loader(single, Split(batch_size=1), cache=tmp_path / "not" / "there")
        assert (tmp_path / "not" / "there").is_dir()


def test_workers_get_the_environment_that_was_when_they_were_asked_for(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVEEDIT_SEEN", "then")
    asked = loader(single, Split(batch_size=1, workers=1))._loader
    assert asked.multiprocessing_context.get_start_method() == "forkserver"  # not of this process
    monkeypatch.setenv("LIVEEDIT_SEEN", "later")
    now = everything()
    try:
        asked.worker_init_fn(0)
        assert variable("LIVEEDIT_SEEN") == "then"
    finally:
        become(now)


@pytest.mark.parametrize("world", [2, 3, 5, COUNT])
def test_ranks_share_an_epoch_equally(encoded: Path, world: int) -> None:
    ranks = [
        keys(loader(encoded, Split(batch_size=2, rank=r, world_size=world, epochs=1)))
        for r in range(world)
    ]
    assert len({tuple(map(len, rank)) for rank in ranks}) == 1  # same batches of the same sizes
    seen = Counter(key for rank in ranks for batch in rank for key in batch)
    assert max(seen.values()) == 1
    assert sum(seen.values()) == COUNT - COUNT % world


def test_the_left_over_sample_changes_with_the_epoch(encoded: Path) -> None:
    left_over = set()
    for seed in range(8):
        seen: set[int] = set()
        for rank in range(2):
            seen |= set(
                flat(
                    loader(
                        encoded, Split(batch_size=1, rank=rank, world_size=2, epochs=1, seed=seed)
                    )
                )
            )
        left_over |= set(range(COUNT)) - seen
    assert len(left_over) > 2


def test_more_ranks_and_workers_than_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", [small_encoded(n) for n in range(6)], made_by={})
    seen = [
        flat(
            loader(tmp_path / "one", Split(batch_size=1, rank=r, world_size=2, workers=2, epochs=1))
        )
        for r in range(2)
    ]
    assert sorted(seen[0] + seen[1]) == list(range(6))


def test_endless_batches_are_always_full(encoded: Path) -> None:
    batches = keys(take(loader(encoded, Split(batch_size=4, world_size=2, rank=1)), 20))
    assert {len(batch) for batch in batches} == {4}
    assert len({key for batch in batches for key in batch}) == COUNT


@pytest.mark.parametrize(("done", "workers"), [(0, 0), (1, 0), (3, 0), (7, 0), (3, 2)])
def test_resume_is_exact(encoded: Path, workers: int, done: int) -> None:
    options = {"batch_size": 2, "rank": 1, "world_size": 2, "seed": 5, "workers": workers}
    whole = loader(encoded, Split(**options))  # type: ignore[arg-type]
    iterator = iter(whole)
    for _ in range(done):
        next(iterator)
    state = pickle.loads(pickle.dumps(whole.state_dict()))
    rest = [next(iterator) for _ in range(6)]  # across the end of an epoch of five samples a rank
    resumed = loader(encoded, Split(**options), state=state)  # type: ignore[arg-type]
    again = take(resumed, 6)
    assert keys(again) == keys(rest)
    for one, two in zip(rest, again, strict=True):
        assert torch.equal(one["source"], two["source"])


def test_a_resumed_run_can_be_resumed(encoded: Path) -> None:
    whole = keys(take(loader(encoded, Split(batch_size=2)), 15))
    done, state = [], None
    for _ in range(5):
        part = loader(encoded, Split(batch_size=2), state=state)
        done += keys(take(part, 3))
        state = part.state_dict()
    assert done == whole


def test_resume_reads_only_what_is_left(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.shard_reader import ShardFolder

    first = loader(encoded, Split(batch_size=1, shuffle=False, epochs=1))
    iterator = iter(first)
    for _ in range(9):
        next(iterator)
    state = first.state_dict()
    read: list[str] = []
    original = ShardFolder.read

    def spy(self: ShardFolder, shard: Any, row: int) -> Any:
        read.append(shard.name)
        return original(self, shard, row)

    monkeypatch.setattr(ShardFolder, "read", spy)
    assert flat(loader(encoded, Split(batch_size=1, shuffle=False, epochs=1), state=state)) == [
        9,
        10,
    ]
    assert read == ["shard-00003.tar"] * 2


def test_the_state_at_the_end_is_that_of_a_new_start(encoded: Path) -> None:
    whole = loader(encoded, Split(batch_size=3, epochs=1))
    order = flat(whole)
    assert flat(loader(encoded, Split(batch_size=3, epochs=1), state=whole.state_dict())) == order


def test_a_second_pass_starts_anew(encoded: Path) -> None:
    batches = loader(encoded, Split(batch_size=4, epochs=1))
    assert flat(batches) == flat(batches)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"world_size": 1}, "world_size 2, now it is 1"),
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"workers": 1}, "workers 0, now it is 1"),
        ({"shuffle": False}, "shuffle True, now it is False"),
    ],
)
def test_a_state_of_another_split_is_refused(
    encoded: Path, change: dict[str, Any], words: str
) -> None:
    options: dict[str, Any] = {"batch_size": 1, "world_size": 2}
    state = loader(encoded, Split(**options)).state_dict()
    with pytest.raises(ValueError, match=words):
        loader(encoded, Split(**{**options, **change}), state=state)


def test_a_state_of_another_dataset_is_refused(encoded: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [small_encoded(99)], made_by={})
    state = loader(encoded, Split(batch_size=1)).state_dict()
    with pytest.raises(ValueError, match="saved with dataset"):
        loader(tmp_path / "set", Split(batch_size=1), state=state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"world_size": 12}, "11 samples cannot be split over 12 ranks with 1 workers"),
        ({"world_size": 2, "workers": 6}, "cannot be split over 2 ranks with 6 workers"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_impossible_splits_are_refused_at_once(
    encoded: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        loader(encoded, Split(**{"batch_size": 1, **options}))


def test_errors_in_workers_keep_their_type_and_words(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [small_encoded(n) for n in range(2)], made_by={})
    (tmp_path / "set" / "shard-00000.tar").unlink()
    with pytest.raises(DatasetError, match=r"shard-00000\.tar is missing"):
        list(loader(tmp_path / "set", Split(batch_size=1, workers=1, epochs=1)))


def test_torch_generator_is_left_alone(encoded: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(loader(encoded, Split(batch_size=2)), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_split_begins_at_the_same_share_of_the_epoch(encoded: Path) -> None:
    was = loader(encoded, Split(batch_size=1, rank=0, world_size=1))
    state = was.state_dict()
    assert loader(encoded, Split(batch_size=2, rank=0, world_size=1)).goes_on_from(state)
    assert not loader(encoded, Split(batch_size=1, rank=0, world_size=2)).goes_on_from(state)
    assert not loader(encoded, Split(batch_size=1, workers=1)).goes_on_from(state)
    other, own = (loader(encoded, Split(batch_size=1, rank=r, world_size=2)) for r in range(2))
    assert own.goes_on_from(own.state_dict())
    assert not own.goes_on_from(other.state_dict())
    for rank in range(2):  # five samples an epoch each
        whole = take(loader(encoded, Split(batch_size=1, rank=rank, world_size=2)), 15)
        for share, read in ((1.8, 9), (1.4, 7)):
            other = loader(encoded, Split(batch_size=1, rank=rank, world_size=2))
            other.skip(share)
            assert flat(take(other, 15 - read)) == flat(whole[read:])
        position = loader(encoded, Split(batch_size=1, rank=rank, world_size=2))
        position.load_state_dict(other.state_dict())
        assert position.goes_on_from(other.state_dict())
