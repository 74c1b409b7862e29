"""data/manifest.py: what a dataset is known by, which what was made of it names for ever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.manifest import DatasetInfo, Shard, dataset_hash
from data.pairs import _mismatch
from data.shards import DatasetError, write_dataset
from tests.data.conftest import small_encoded

INFO = DatasetInfo(
    format_version=1, kind="encoded", samples=19, fps=16.0, frames=33, height=128, width=224,
    shards=(Shard("shard-00000.tar", 16, 4096, "ab" * 32), Shard("shard-00001.tar", 3, 99, "0")),
    made_by={"by": "hand"},
)  # fmt: skip


def test_the_hash_of_a_dataset_does_not_move() -> None:
    """Trainings go on, and stages are skipped, where it is the one that they wrote down."""
    assert dataset_hash(INFO) == "70591c988b782df08cb555638528f3ac7e0c5b4b78b2a86a3fe02480c9a137e9"
    assert dataset_hash(replace(INFO, made_by={})) == dataset_hash(INFO)
    others = [replace(INFO, **change) for change in (
        {"kind": "pairs"}, {"samples": 18}, {"fps": 15.0}, {"frames": 29}, {"height": 112},
        {"width": 208}, {"shards": INFO.shards[:1]}, {"shards": INFO.shards[::-1]},
    )]  # fmt: skip
    assert len({dataset_hash(info) for info in (INFO, *others)}) == 9


def test_a_shard_holds_sixteen_samples_unless_told(tmp_path: Path) -> None:
    info = write_dataset(tmp_path / "set", [small_encoded(n) for n in range(17)], made_by={})
    assert [shard.count for shard in info.shards] == [16, 1]


def test_a_sample_unlike_the_others_is_named_by_its_number(tmp_path: Path) -> None:
    """Of all, and not of its shard."""
    samples = [small_encoded(n) for n in range(4)]
    samples.append(replace(samples[0], fps=8.0))
    with pytest.raises(DatasetError, match=r"sample 4 is .* 8\.0, .*, sample 0 is .* 16\.0"):
        write_dataset(tmp_path / "set", samples, made_by={}, samples_per_shard=3)


@pytest.mark.parametrize(
    ("width", "fits"), [(981, True), (979, False), (1019, True), (1021, False)]
)
def test_an_edit_has_the_shape_of_its_source_but_for_a_little(width: int, fits: bool) -> None:
    source: Any = SimpleNamespace(width=500, height=500)
    edited: Any = SimpleNamespace(width=width, height=1000)
    assert (_mismatch(source, edited) is None) is fits
