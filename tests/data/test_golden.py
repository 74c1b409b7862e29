"""Datasets that name only a seed: it gives the same pair for ever, or `VERSION` is raised.

PYTHONPATH=. python -m tests.data.test_golden     writes what the seeds give now
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.bench import cases
from data.footage import looks, material, weather, wordings
from data.footage import pair as footage_pair
from data.footage.kinds import KINDS, LOOK_WEIGHTS
from data.footage.material import Footage
from data.footage.objects import PAINTS, PLACES
from data.footage.pair import make_footage_pair
from data.footage.regions import CHROMA, HUES, WIDTH
from data.kinds import EDITS
from data.sample import Pair
from data.synthetic import VERSION, make_pair

REFERENCE = Path(__file__).parents[1] / "reference"
KNOWN = REFERENCE / "synthetic_pairs.json"
FOOTAGE = REFERENCE / "footage_pairs.json"
SEEDS = 24
# Of footage: every kind, look, side, material and number of things is among them.
FILMED = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 20, 22, 27, 29, 30, 32, 35, 36, 49, 54, 55,
          59, 60, 73, 109, 119, 123, 138, 152, 209, 230)  # fmt: skip


def described(seed: int, split: str) -> dict[str, object]:
    return summed(make_pair(seed, height=48, width=72, frames=6, fps=12, split=split))


def summed(pair: Pair) -> dict[str, object]:
    """A pair as its words and sums that see each pixel's place, frame and colour."""
    sums = [mean for video in (pair.source, pair.target) for mean in means(video)]
    return {
        "instruction": pair.instruction,
        "origin": pair.origin,
        "sums": sums,
        "mask": int(pair.mask.sum()),
    }


def means(video: np.ndarray) -> list[float]:
    """Of each channel, plain and weighted by frame, row and column."""
    frames, height, width = video.shape[:3]
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    return [
        float((video.astype(float) * weight[..., None]).mean(axis=(0, 1, 2)).round(3)[channel])
        for weight in (np.ones_like(x), t / frames, y / height, x / width)
        for channel in range(3)
    ]


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


def drawn_footage(folder: Path) -> dict[str, Footage]:
    """Two photos and two clips as they are when they are prepared: no decoder takes part."""
    rng = np.random.Generator(np.random.PCG64(7))
    entries: dict[str, list[dict[str, object]]] = {"train": [], "heldout": []}
    for name, kind, frames in (
        ("a.jpg", "photo", 1), ("b.jpg", "photo", 1), ("c.mp4", "clip", 9), ("d.mp4", "clip", 4),
    ):  # fmt: skip
        level = rng.integers(0, 256, (frames, 9, 14, 3)).astype(np.uint8)
        level = level.repeat(16, axis=1).repeat(16, axis=2)
        levels: list[str] = []
        while min(level.shape[1:3]) >= material.SMALLEST_SIDE:
            levels.append(f"{name}-{len(levels)}.npy")
            np.save(folder / levels[-1], level)
            level = level[:, ::2, ::2]
        for split in entries:
            entries[split].append({"name": name, "kind": kind, "levels": levels})
    (folder / material.INDEX).write_text(json.dumps(entries))
    return {split: Footage(folder, split) for split in entries}


def filmed(folder: Path) -> dict[str, dict[str, object]]:
    found = drawn_footage(folder)
    splits = ("train", "heldout")
    return {
        str(seed): summed(
            make_footage_pair(seed, found[splits[seed % 2]], height=16, width=28, frames=4, fps=8)
        )
        for seed in FILMED
    }


AMOUNTS = (wordings.GENTLE, wordings.PLAIN, wordings.STRONG)
UNITS = (1.0, 2.0)


def looked() -> dict[str, list[float]]:
    """Every look, gentle to strong, on a small picture and on one of twice the size."""
    rng = np.random.Generator(np.random.PCG64(5))
    video = rng.integers(0, 256, (3, 16, 24, 3)).astype(np.float32)
    video[1] = video[0].mean(axis=(0, 1))  # a plain frame between, for what works by edges
    made = {}
    for amount in AMOUNTS:
        for unit in UNITS:
            of = f"{amount} {unit}"
            for name, look in looks.LOOKS.items():
                made[f"{name} {of}"] = look(video, amount, unit)
            for fall in (weather.snow, weather.rain):
                seed = np.random.Generator(np.random.PCG64(3))
                wide = np.full((3, 64, 96, 3), 90, np.float32)  # with room for more than a drop
                made[f"{fall.__name__} {of}"] = fall(wide, amount, unit, seed)
        for side in wordings.SIDES:
            made[f"light {side} {amount}"] = looks.light_from(video, side, amount)
    return {name: means(picture) for name, picture in made.items()}


@pytest.fixture(scope="module")
def known_footage() -> Any:
    return json.loads(FOOTAGE.read_text())


def test_every_seed_gives_the_pair_of_footage_that_it_always_gave(
    tmp_path: Path, known_footage: Any
) -> None:
    assert known_footage["version"] == footage_pair.VERSION
    found = filmed(tmp_path)
    assert found.keys() == known_footage["pairs"].keys()
    for seed, pair in found.items():
        wanted = known_footage["pairs"][seed]
        assert pair["instruction"] == wanted["instruction"], seed
        assert pair["origin"] == wanted["origin"], seed
        # Another Pillow may round the camera's picture otherwise, here and there by one.
        np.testing.assert_allclose(pair["sums"], wanted["sums"], atol=0.5, err_msg=seed)
        if wanted["origin"]["kind"] == "nothing":
            assert pair["mask"] == 0, seed


def test_every_look_is_as_strong_as_it_always_was(known_footage: Any) -> None:
    found = looked()
    assert found.keys() == known_footage["looks"].keys()
    for name, sums in found.items():
        np.testing.assert_allclose(sums, known_footage["looks"][name], atol=0.02, err_msg=name)


def test_the_known_pairs_of_footage_show_all_that_can_be_asked_for(known_footage: Any) -> None:
    origins = [pair["origin"] for pair in known_footage["pairs"].values()]
    assert {origin["kind"] for origin in origins} == KINDS.keys()
    assert {origin.get("look") for origin in origins} == {None, *wordings.LOOK_WORDS}
    assert {origin["material"] for origin in origins} == {"a.jpg", "b.jpg", "c.mp4", "d.mp4"}
    assert {origin.get("side") for origin in origins} == {None, *wordings.SIDES}
    assert {len(origin["things"]) for origin in origins} >= {0, 1, 2, 3}
    assert any("second" in origin for origin in origins)


def table(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def test_the_tables_that_a_version_stands_for_are_the_same_to_the_letter() -> None:
    """Of words, of strengths and of clips: most rows no known pair shows. With another hash raise
    `VERSION`, of the footage's pairs or of the benchmark."""
    said = [
        [[name, list(by.items())] for name, by in wordings.LOOK_WORDS.items()],
        list(wordings.PART_WORDS.items()), wordings.JOINS, wordings.SIDES,
        [[name, kind.weight, kind.of_a_thing] for name, kind in KINDS.items()],
        [list(of.items()) for of in (PAINTS, PLACES, HUES, LOOK_WEIGHTS)], WIDTH, CHROMA,
    ]  # fmt: skip
    assert (footage_pair.VERSION, table(said)) == (2, "855d94051b5ee683")
    asked = [asdict(case) | {"name": case.name, "frames": case.frames} for case in cases.CASES]
    assert (cases.VERSION, table(asked)) == (1, "cf16a00b0a95adcf")
    drawn = [[name, kind.weight, kind.phrases] for name, kind in EDITS.items()]
    assert (VERSION, table(drawn)) == (1, "c2719c6cbb152611")


if __name__ == "__main__":
    import tempfile

    KNOWN.write_text(json.dumps({"version": VERSION, **all_described()}) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        pairs = filmed(Path(folder))
    about = {"version": footage_pair.VERSION, "pairs": pairs, "looks": looked()}
    FOOTAGE.write_text(json.dumps(about) + "\n")
