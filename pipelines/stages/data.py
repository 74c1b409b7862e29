"""Datasets of editing pairs that are made: of drawn scenes, or of the user's photos and clips."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data import synthetic
from data.footage.material import (
    SPLITS,
    FootageError,
    footage_hash,
    names_by_split,
    prepare,
)
from data.footage.pair import VERSION as FOOTAGE_VERSION
from data.footage.pair import make_footage_pair
from data.manifest import DatasetInfo, read_dataset_info
from data.sample import Pair
from data.shards import write_dataset
from infra.runtime.paths import find_path
from pipelines.stages.chain import Chain
from pipelines.tracking.outbox import Run

SEED_STRIDE = 1_000_000  # seeds of two datasets overlap only beyond this many pairs

OnPair = Callable[[int], None]  # hears how many pairs are under way or done


@dataclass(frozen=True)
class PairRecipe:
    """How many pairs of which kind, and how they are made and stored."""

    pairs: int
    height: int
    width: int
    frames: int
    fps: float
    seed: int
    split: str
    samples_per_shard: int
    workers: int  # processes
    overwrite: bool = False

    @property
    def clip(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("height", "width", "frames", "fps")}


def pairs(chain: Chain, split: str) -> str:
    """The pipeline's `train` or `heldout` pairs: those that the user gave, or made ones."""
    data, stream = chain.config.data, chain.model.stream
    stage = "data" if split == "train" else "heldout"
    given = data.train if split == "train" else data.heldout
    count = data.pairs if split == "train" else data.heldout_pairs
    if given is not None:
        info = read_dataset_info(given)
        chain.runner.pass_over(stage, f"{given}, {info.samples} pairs")
        return given
    target = str(chain.output / "data" / split)

    def make(run: Run, key: str) -> dict[str, float]:
        recipe = PairRecipe(
            pairs=count,
            height=stream.height,
            width=stream.width,
            frames=data.frames,
            fps=stream.fps,
            seed=data.seed,
            split=split,
            samples_per_shard=data.samples_per_shard,
            workers=data.workers,
            overwrite=True,
        )

        def on_pair(done: int) -> None:
            chain.view.update(stage, done, count, f"{done}/{count} pairs")

        if data.footage is None:
            make_synthetic(target, recipe, on_pair=on_pair)
        else:
            make_from_footage(target, find_path(data.footage), recipe, on_pair=on_pair)
        return {"pairs": float(count)}

    inputs: dict[str, Any] = {
        "generator": synthetic.VERSION if data.footage is None else FOOTAGE_VERSION,
        "pairs": count,
        "size": [stream.height, stream.width, data.frames, stream.fps],
        "seed": data.seed,
        "split": split,
        "samples_per_shard": data.samples_per_shard,
    }
    if data.footage is not None:
        folder = find_path(data.footage)
        # Whoever names another photo in heldout.txt wants it out of the pairs that are there.
        inputs |= {"footage": footage_hash(folder), "files": names_by_split(folder)[split]}
    return chain.run(stage, inputs, target, make).output


def make_synthetic(
    uri: str, recipe: PairRecipe, *, on_pair: OnPair = lambda done: None
) -> DatasetInfo:
    """Write synthetic pairs to `uri`."""
    make = partial(synthetic.make_pair, split=recipe.split, **recipe.clip)
    made_by = {"generator": "synthetic", "version": synthetic.VERSION}
    return _write(uri, recipe, make, made_by, on_pair)


def make_from_footage(
    uri: str, source: Path, recipe: PairRecipe, *, on_pair: OnPair = lambda done: None
) -> DatasetInfo:
    """Write pairs of the footage in folder `source` to `uri`.

    Photos and clips are first read into a temporary folder ($TMPDIR), up to 150 MB a clip.
    """
    if recipe.split not in SPLITS:
        raise FootageError(f"split must be one of {SPLITS}, got {recipe.split!r}")
    with tempfile.TemporaryDirectory(prefix="liveedit-footage-") as folder:
        footage = prepare(
            source,
            folder,
            height=recipe.height,
            width=recipe.width,
            fps=recipe.fps,
            workers=recipe.workers,
        )[recipe.split]
        make = partial(make_footage_pair, footage=footage, **recipe.clip)
        made_by = {
            "generator": "footage",
            "version": FOOTAGE_VERSION,
            "footage": footage_hash(source),
            "files": [item.name for item in footage.materials],
        }
        return _write(uri, recipe, make, made_by, on_pair)


def _write(
    uri: str,
    recipe: PairRecipe,
    make: Callable[[int], Pair],  # of a seed; worker processes get it
    made_by: Mapping[str, Any],
    on_pair: OnPair,
) -> DatasetInfo:
    def samples() -> Iterator[Callable[[], Pair]]:
        for number in range(recipe.pairs):
            on_pair(number)
            yield partial(make, recipe.seed * SEED_STRIDE + number)

    return write_dataset(
        uri,
        samples(),
        made_by={**made_by, "seed": recipe.seed, "split": recipe.split, **recipe.clip},
        samples_per_shard=recipe.samples_per_shard,
        workers=recipe.workers,
        overwrite=recipe.overwrite,
    )
