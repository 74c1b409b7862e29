"""Synthetic datasets of editing pairs, as the pipeline and `liveedit data make` want them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from data.manifest import DatasetInfo
from data.sample import Pair
from data.shards import write_dataset
from data.synthetic import VERSION, make_pair

SEED_STRIDE = 1_000_000  # seeds of two datasets overlap only beyond this many pairs


def make_synthetic(
    uri: str,
    *,
    pairs: int,
    height: int,
    width: int,
    frames: int,
    fps: float,
    seed: int,
    split: str,
    samples_per_shard: int,
    workers: int,
    overwrite: bool = False,
    on_pair: Callable[[int], None] = lambda done: None,
) -> DatasetInfo:
    """Write `pairs` synthetic pairs to `uri`; `on_pair` hears how many are under way or done."""
    recipe: dict[str, Any] = {
        "height": height,
        "width": width,
        "frames": frames,
        "fps": fps,
        "split": split,
    }

    def samples() -> Iterator[Callable[[], Pair]]:
        for number in range(pairs):
            on_pair(number)
            yield partial(make_pair, seed * SEED_STRIDE + number, **recipe)

    made_by = {"generator": "synthetic", "version": VERSION, "seed": seed, **recipe}
    return write_dataset(
        uri,
        samples(),
        made_by=made_by,
        samples_per_shard=samples_per_shard,
        workers=workers,
        overwrite=overwrite,
    )
