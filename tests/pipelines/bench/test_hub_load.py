"""What a hub is measured with does what a hub does."""

from __future__ import annotations

import pytest

from pipelines.bench.hub_load import commit_s, placement_s


@pytest.mark.slow  # starts a hub and a front, twice
def test_a_real_hub_takes_real_commits_and_whole_states_cost_more() -> None:
    for _ in range(3):  # a busy machine's caches are others'
        new, whole = (
            commit_s(7_000_000, whole=whole, fronts=1, sessions=1, chunks=8)
            for whole in (False, True)
        )
        if new < whole:
            break
    assert 0 < new < whole


def test_placing_deciding_and_reports_are_counted() -> None:
    found = placement_s(4, 12, rounds=8)
    assert found.keys() == {"place", "report", "decide"}
    assert min(found.values()) > 0
