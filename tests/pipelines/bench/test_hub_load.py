"""What a hub is measured with does what a hub does."""

from __future__ import annotations

from pipelines.bench.hub_load import commit_s, placement_s


def test_a_real_hub_takes_real_commits_and_larger_ones_cost_more() -> None:
    small, large = (commit_s(size, fronts=1, sessions=1, chunks=4) for size in (1000, 20_000_000))
    assert 0 < small < large


def test_placing_deciding_and_reports_are_counted() -> None:
    found = placement_s(4, 12, rounds=8)
    assert found.keys() == {"place", "report", "decide"}
    assert min(found.values()) > 0
