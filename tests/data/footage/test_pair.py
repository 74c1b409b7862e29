"""data/footage/pair.py: exact truth, whole files held out, nothing but the edit changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.footage import pair as pair_module
from data.footage.kinds import KINDS, Edit
from data.footage.material import Footage, FootageError, Material, is_heldout
from data.footage.objects import PAINTS
from data.footage.pair import make_footage_pair
from tests.data.footage.conftest import made


@pytest.mark.parametrize("size", [(16, 16), (33, 17), (77, 101), (48, 160), (160, 48), (270, 480)])
def test_pairs_of_any_size(footage: dict[str, Footage], size: tuple[int, int]) -> None:
    """Of footage that is smaller, larger and of another shape; every kind that comes."""
    height, width = size
    for seed in range(2 if min(size) > 100 else 8):
        pair = make_footage_pair(seed, footage["train"], frames=5, height=height, width=width)
        assert pair.source.shape == pair.target.shape == (5, height, width, 3)
        assert pair.source.std() > 1


def test_one_seed_gives_one_pair(footage: dict[str, Footage]) -> None:
    one, two, other = (made(footage["train"], seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.source, two.source)
    np.testing.assert_array_equal(one.target, two.target)
    assert one.instruction == two.instruction
    assert not np.array_equal(one.source, other.source)


def test_whole_files_are_held_out(footage: dict[str, Footage]) -> None:
    seen = {made(footage["train"], seed).origin["material"] for seed in range(30)}
    assert seen == {"a.jpg", "b.png", "c.mp4"}
    assert made(footage["heldout"], 0).origin["material"] == "kept.jpg"
    by_hash = [is_heldout(f"IMG_{n}.jpg") for n in range(800)]
    assert 70 < sum(by_hash) < 130


def test_the_splits_draw_other_pairs_of_one_seed(footage: dict[str, Footage]) -> None:
    """Of the same files, too: what is held out is no training pair with another photo."""
    train = footage["train"]
    heldout = replace(train, split="heldout")
    heldout.__dict__["materials"] = train.materials
    for seed in range(4):
        one, two = made(train, seed).origin, made(heldout, seed).origin
        names = ("material", "kind", "things")
        assert [one[name] for name in names] != [two[name] for name in names]


def test_masks_say_what_differs_and_nothing_to_do_changes_nothing(
    footage: dict[str, Footage],
) -> None:
    kinds = set()
    for seed in range(120):
        pair = made(footage["train"], seed)
        kinds.add(pair.origin["kind"])
        np.testing.assert_array_equal(pair.mask, (pair.source != pair.target).any(-1))
        if pair.origin["kind"] == "nothing":
            assert not pair.mask.any()
        elif pair.origin["kind"] in ("recolor", "replace", "remove", "add"):
            assert pair.mask.any(), pair.instruction
        named = [paint if paint in PAINTS else shape for paint, shape in pair.origin["things"]]
        assert len(set(named)) == len(named), pair.origin["things"]
        assert " a o" not in pair.instruction
        assert "{" not in pair.instruction
    assert kinds == {
        "look", "hue", "drain", "recolor", "replace", "remove", "add", "blur_background",
        "dark_background", "gray_background", "nothing",
    }  # fmt: skip


def test_a_second_edit_is_made_of_what_the_first_one_made(
    footage: dict[str, Footage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one that changes nothing the pair is that of the first alone."""
    monkeypatch.setattr(pair_module, "SECOND_LOOK", 0.0)
    alone = {seed: made(footage["train"], seed) for seed in range(12)}
    same = {n: pair for n, pair in alone.items() if pair.origin["kind"] not in ("look", "nothing")}
    assert any(pair.mask.any() for pair in same.values())
    monkeypatch.setattr(pair_module, "SECOND_LOOK", 1.0)
    monkeypatch.setattr(
        pair_module, "look", lambda scene, kind, video: Edit("leave it so", video, {"kind": kind})
    )
    for seed, pair in same.items():
        both = made(footage["train"], seed)
        assert "leave it so" in both.instruction
        np.testing.assert_array_equal(both.target, pair.target)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_to_do_and_a_look_get_no_second_edit(
    footage: dict[str, Footage], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(pair_module, "SECOND_LOOK", 1.0)
    for kind, second in (("nothing", False), ("look", False), ("add", True)):
        alone = {name: replace(KINDS[name], weight=float(name == kind)) for name in KINDS}
        monkeypatch.setattr(pair_module, "KINDS", alone)
        pair = made(footage["train"], seed)
        assert ("second" in pair.origin) == second
        assert pair.mask.any() == (kind != "nothing")


def test_clips_that_are_long_enough_are_filmed_beside_photos(footage: dict[str, Footage]) -> None:
    def drawn(frames: int, photos: bool = True) -> list[str]:
        of = replace(footage["train"])
        of.__dict__["photos"] = footage["train"].photos if photos else ()
        of.__dict__["clips"] = tuple(  # so small that there is one level
            replace(clip, levels=clip.levels[:1]) for clip in footage["train"].clips
        )
        rng = np.random.default_rng(0)
        return [pair_module._material(of, frames, rng).name for _ in range(200)]

    share = drawn(24).count("c.mp4") / 200
    assert 0.3 < share < 0.5
    assert set(drawn(25)) == {"a.jpg", "b.png"}
    assert set(drawn(24, photos=False)) == {"c.mp4"}
    with pytest.raises(FootageError, match="the train split holds no photo and no clip of 25 fr"):
        drawn(25, photos=False)


@pytest.mark.parametrize(
    ("levels", "side", "cut", "of"),
    [(4, 5, 5, 2), (3, 6, 6, 2), (3, 7, 6, 2), (3, 40, 6, 2), (2, 5, 5, 1), (1, 5, 5, 0)],
)
def test_a_cutout_is_any_square_of_a_photo_a_quarter_as_fine(
    tmp_path: Path, levels: int, side: int, cut: int, of: int
) -> None:
    """Or as nearly so as there is a level, and no larger than it. The photo is of 24 x 36."""
    names = []
    for level in range(levels):
        rows, columns = np.mgrid[: 24 >> level, : 36 >> level]
        names.append(str(tmp_path / f"{level}.npy"))
        np.save(names[-1], np.stack([rows, columns, rows * 0 + level], -1).astype(np.uint8)[None])
    footage: Any = SimpleNamespace(photos=[Material("a.png", "photo", tuple(names))])
    found = [pair_module._cutout(footage, side, np.random.default_rng(n)) for n in range(300)]
    for piece in found:
        rows, columns = np.mgrid[:cut, :cut]
        wanted = np.stack([piece[0, 0, 0] + rows, piece[0, 0, 1] + columns, rows * 0 + of], -1)
        np.testing.assert_array_equal(piece, wanted)
    corners = np.array([piece[0, 0, :2] for piece in found])
    assert corners.min(axis=0).tolist() == [0, 0]
    assert corners.max(axis=0).tolist() == [(24 >> of) - cut, (36 >> of) - cut]
