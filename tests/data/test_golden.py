"""Datasets that name only a seed: it gives the same pair for ever, or `VERSION` is raised.

PYTHONPATH=. python -m tests.data.test_golden     writes what the seeds give now
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data.kinds import EDITS
from data.synthetic import VERSION, make_pair

KNOWN = Path(__file__).parents[1] / "reference" / "synthetic_pairs.json"
SEEDS = 24


def described(seed: int, split: str) -> dict[str, object]:
    """A pair as its words and sums that see each pixel's place, frame and colour."""
    pair = make_pair(seed, height=48, width=72, frames=6, fps=12, split=split)
    frames, height, width = pair.video_shape
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    sums = [
        float((video * weight[..., None]).mean(axis=(0, 1, 2)).round(3)[channel])
        for video in (pair.source.astype(float), pair.target.astype(float))
        for weight in (np.ones_like(x), t / frames, y / height, x / width)
        for channel in range(3)
    ]
    return {
        "instruction": pair.instruction,
        "origin": pair.origin,
        "sums": sums,
        "mask": int(pair.mask.sum()),
    }


def all_described() -> dict[str, list[dict[str, object]]]:
    return {split: [described(n, split) for n in range(SEEDS)] for split in ("train", "heldout")}


def test_every_seed_gives_the_pair_that_it_always_gave() -> None:
    known = json.loads(KNOWN.read_text())
    assert known["version"] == VERSION
    for split, pairs in all_described().items():
        for seed, (found, wanted) in enumerate(zip(pairs, known[split], strict=True)):
            place = f"{split} {seed}"
            assert found["instruction"] == wanted["instruction"], place
            assert found["origin"] == wanted["origin"], place
            # Another machine's sine may move a rounding here and there, no more.
            np.testing.assert_allclose(found["sums"], wanted["sums"], atol=0.02, err_msg=place)
            assert abs(int(str(found["mask"])) - wanted["mask"]) <= 0.01 * wanted["mask"] + 3, place


def test_the_known_pairs_show_all_that_can_be_drawn() -> None:
    known = json.loads(KNOWN.read_text())
    pairs = [pair for split in ("train", "heldout") for pair in known[split]]
    for name, count in (("edit", 5), ("shape", 6), ("color", 8), ("motion", 5), ("background", 5)):
        assert len({pair["origin"][name] for pair in pairs}) == count, name
    assert {pair["origin"]["edit"] for pair in pairs} == EDITS.keys()
    assert {pair["origin"]["objects"] for pair in pairs} == {1, 2}


if __name__ == "__main__":
    KNOWN.write_text(json.dumps({"version": VERSION, **all_described()}) + "\n")
