from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.footage.material import FootageError
from data.footage.pair import VERSION as FOOTAGE_VERSION
from data.loader import Split, loader
from data.store import DatasetError
from data.synthetic import VERSION, make_pair
from pipelines.stages import data
from pipelines.stages.data import PairRecipe, make_synthetic
from tests.pipelines.stages.told import heard


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


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pairs_of_footage_are_made_of_its_split_and_say_of_what(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip: dict[str, Any] = {"height": 32, "width": 48, "frames": 5, "fps": 8.0}
    parts = {
        name: SimpleNamespace(materials=[SimpleNamespace(name=f"{name}.png")])
        for name in ("train", "heldout")
    }
    prepared = heard(data, "prepare", monkeypatch, parts)
    made = heard(data, "make_footage_pair", monkeypatch)
    monkeypatch.setattr(data, "footage_hash", str)
    written: list[Any] = []

    def write(uri: str, samples: Any, **named: Any) -> Any:
        written.append((uri, [sample() for sample in samples], named))

    monkeypatch.setattr(data, "write_dataset", write)
    seen: list[int] = []
    recipe = PairRecipe(2, seed=3, split=split, samples_per_shard=7, workers=4, **clip)
    data.make_from_footage("set", tmp_path, recipe, on_pair=seen.append)
    (((source, _), sizes),) = prepared
    assert (source, sizes) == (tmp_path, {"height": 32, "width": 48, "fps": 8.0, "workers": 4})
    assert made == [
        ((3_000_000 + n,), {"footage": parts[split], **clip}) for n in range(2)
    ]  # fmt: skip
    ((uri, _, named),) = written
    assert (uri, seen) == ("set", [0, 1])
    assert named == {
        "made_by": {
            "generator": "footage", "version": FOOTAGE_VERSION, "footage": str(tmp_path),
            "files": [f"{split}.png"], "seed": 3, "split": split, **clip,
        },
        "samples_per_shard": 7, "workers": 4, "overwrite": False,
    }  # fmt: skip
    with pytest.raises(FootageError, match=r"split must be one of .*, got 'test'"):
        data.make_from_footage("set", tmp_path, replace(recipe, split="test"))
