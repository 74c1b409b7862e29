"""Datasets of editing pairs made from the user's photos and clips (`data make --from`)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.footage.material import SPLITS, FootageError, footage_hash, prepare
from data.footage.pair import VERSION, make_footage_pair
from data.manifest import DatasetInfo
from data.sample import Pair
from data.shards import write_dataset
from pipelines.stages.data import SEED_STRIDE


def make_from_footage(
    uri: str,
    source: Path,
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
    """Write `pairs` pairs of the footage in folder `source`; as `make_synthetic` otherwise.

    Photos and clips are first read into a temporary folder ($TMPDIR), up to 150 MB a clip.
    """
    if split not in SPLITS:
        raise FootageError(f"split must be one of {SPLITS}, got {split!r}")
    recipe: dict[str, Any] = {"height": height, "width": width, "frames": frames, "fps": fps}
    with tempfile.TemporaryDirectory(prefix="liveedit-footage-") as folder:
        footage = prepare(source, folder, height=height, width=width, fps=fps, workers=workers)[
            split
        ]

        def samples() -> Iterator[Callable[[], Pair]]:
            for number in range(pairs):
                on_pair(number)
                yield partial(make_footage_pair, seed * SEED_STRIDE + number, footage, **recipe)

        made_by = {
            "generator": "footage", "version": VERSION, "seed": seed, "split": split,
            "footage": footage_hash(source), "files": [item.name for item in footage.materials],
            **recipe,
        }  # fmt: skip
        return write_dataset(
            uri,
            samples(),
            made_by=made_by,
            samples_per_shard=samples_per_shard,
            workers=workers,
            overwrite=overwrite,
        )
