"""data/footage/kinds.py: which of the things an edit is of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.footage.kinds import VISIBLE, Edit, of_a_thing


@pytest.mark.parametrize(
    ("seen", "chosen"),
    [
        ((0, 0, 0), {2}),  # the last one drawn, which nothing hides
        ((0, 0, 50), {2}),
        ((50, 0, 0), {0}),
        ((0, 50, 50), {1}),
        ((50, 50, 50), {0, 1}),  # any of those that may be hidden goes before it
        ((4, 3, 0), {0}),  # of a thousand pixels four are enough
    ],
)
def test_an_edit_is_of_a_thing_that_can_be_seen(
    seen: tuple[int, int, int], chosen: set[int]
) -> None:
    source = np.zeros((1, 25, 40, 3), np.float32)

    def edit(scene: Any, kind: str, before: np.ndarray, thing: int) -> Edit:
        target = before.copy()
        target.reshape(-1, 3)[: seen[thing], 1] = 1
        return Edit(f"{kind} {thing}", target)

    assert VISIBLE == 0.004
    found = set()
    for seed in range(12):
        scene: Any = SimpleNamespace(things=[0, 1, 2], rng=np.random.default_rng(seed))
        found.add(of_a_thing(edit)(scene, "k", source).instruction)
    assert found == {f"k {thing}" for thing in chosen}
