from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import Split, loader
from data.store import DatasetError
from data.synthetic import VERSION, make_pair
from pipelines.stages.data import PairRecipe, make_synthetic


@pytest.mark.parametrize(
    ("seed", "split", "height", "width"), [(0, "train", 32, 48), (2, "heldout", 77, 35)]
)
def test_pairs_are_those_of_the_seeds_of_this_dataset(
    tmp_path: Path, seed: int, split: str, height: int, width: int
) -> None:
    """Of any size, upright and odd too."""
    clip: dict[str, Any] = {"height": height, "width": width, "frames": 5, "fps": 8.0}
    uri = str(tmp_path / "set")
    heard: list[int] = []
    recipe = PairRecipe(3, seed=seed, split=split, samples_per_shard=2, workers=0, **clip)
    info = make_synthetic(uri, recipe, on_pair=heard.append)
    assert heard == [0, 1, 2]
    assert [shard.count for shard in info.shards] == [2, 1]
    assert (info.frames, info.height, info.width, info.fps) == (5, height, width, 8.0)
    assert info.made_by == {
        "generator": "synthetic", "version": VERSION, "seed": seed, "split": split, **clip,
    }  # fmt: skip
    (batch,) = list(loader(uri, Split(batch_size=3, shuffle=False, epochs=1)))
    for n in range(3):
        pair = make_pair(seed * 1_000_000 + n, split=split, **clip)
        assert batch["instruction"][n] == pair.instruction
        assert np.array_equal(batch["mask"][n], pair.mask)
        assert np.abs(batch["source"][n].numpy().astype(int) - pair.source).mean() < 2
        assert np.abs(batch["target"][n].numpy().astype(int) - pair.target).mean() < 2
    with pytest.raises(DatasetError, match="holds a finished dataset"):
        make_synthetic(uri, recipe)
    make_synthetic(uri, replace(recipe, seed=seed + 1, overwrite=True))
