"""A simulated day: its figures are what its events say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.bench.simulation.day import VARIANTS, Day, Variant, anyone, busy
from pipelines.bench.simulation.late import LateShare
from pipelines.bench.simulation.world import World, simulate
from serve.scaling.decisions import HEADROOM, Editor, Sizes
from serve.scaling.placement import Scale

# Three sessions of 0.25 fill an editor to 0.75 of the 0.8 that may be promised.
DAY = Day(
    sessions=6,
    cost_s=0.1875,
    chunk_frames=12,
    scale=Scale(1, 4, delay_s=300.0),
    sizes=Sizes((64, 96), (64, 96)),
    hours=1.0,
    lost_machines=0,
)


def test_demand_is_highest_in_the_evening() -> None:
    assert busy(20 * 3600) == pytest.approx(1.0)
    assert busy(8 * 3600) == pytest.approx(0.15)
    assert busy(14 * 3600) == pytest.approx(0.15 + 0.85 * 0.5**1.5)
    assert busy(44 * 3600) == pytest.approx(busy(20 * 3600))


def test_where_there_is_room_nobody_waits_and_no_chunk_is_late() -> None:
    figures = simulate(replace(DAY, scale=Scale(4, 4), sessions=3))
    assert figures["asked"] > 3
    assert figures["refused_share"] == figures["left_share"] == figures["late_share"] == 0
    assert figures["waited_s_p99"] == 0
    assert figures["editor_hours"] == pytest.approx(4.0)
    assert figures["most_editors"] == 4


def test_editors_follow_demand_and_no_more_than_are_allowed() -> None:
    few, many = (simulate(replace(DAY, sessions=n)) for n in (3, 40))
    assert few["editor_hours"] < 3.0
    assert many["most_editors"] == 4
    assert many["most_sessions"] <= 4 * 3 + 4  # cheap scenes leave room for a little more
    assert many["refused_share"] > few["refused_share"]


def test_the_same_day_is_the_same_day() -> None:
    assert simulate(DAY) == simulate(DAY)
    assert simulate(DAY) != simulate(replace(DAY, seed=1))


def test_chance_is_the_same_in_every_process() -> None:
    assert anyone(Editor("a", 12, 8)) == (3348152383,)


def test_a_lost_machine_moves_its_sessions_and_loses_none() -> None:
    """All editors are of one machine: every session that is open moves, then goes on."""
    world = World(replace(DAY, lost_machines=1, scale=Scale(4, 4), sessions=6), Variant())
    world.run()
    assert world.tally.moved > 0
    assert len(world.tally.gaps) == world.tally.moved
    # Editors have to start again: that takes at least 0.8 of 60 s.
    assert min(world.tally.gaps) >= 48.0


def test_spare_editors_cost_hours_and_save_waiting() -> None:
    day = replace(DAY, sessions=12, scale=Scale(1, 20, delay_s=60.0), hours=2.0)
    without, spare = simulate(day), simulate(day, VARIANTS["5 % spare"])
    assert spare["editor_hours"] > without["editor_hours"]
    assert spare["refused_share"] < without["refused_share"]


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_chunks_are_late_where_the_load_is_above_one(streams: int) -> None:
    late = LateShare(DAY)
    assert late(0.0, 0) == 0
    assert late(HEADROOM, streams) < 0.01
    # Of twice what it can do half is late, and more where what is late was computed for nothing.
    assert late(2.0, streams) > 0.45
    assert late(HEADROOM, streams) < late(1.2, streams) <= late(1.5, streams)
