"""A simulated day: its figures are what its events say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from infra.runtime.errors import UserError
from pipelines.bench.serve import parse_ways
from pipelines.bench.simulation.arrivals import Client, arrivals
from pipelines.bench.simulation.day import (
    VARIANTS,
    Day,
    Roll,
    Rules,
    anyone,
    busy,
    measured,
    usual_rolls,
)
from pipelines.bench.simulation.late import LateShare
from pipelines.bench.simulation.simulated_editor import Device
from pipelines.bench.simulation.tally import Tally
from pipelines.bench.simulation.world import WARM_S, World, simulate
from serve.admission.admission import HEADROOM, Editor, Sizes
from serve.admission.decisions import Scale
from serve.admission.rungs import Means, Rung

# Three sessions of 0.25 fill an editor to 0.75 of the 0.8 that may be promised.
DAY = Day(
    sessions=6,
    cost_s=0.1875,
    chunk_frames=12,
    scale=Scale(1, 4, delay_s=300.0),
    sizes=Sizes((64, 96), (64, 96)),
    fps=16.0,
    max_sessions=16,
    start_s=60.0,
    load_s=30.0,
    lost_machines=0,
    hours=1.0,
    rungs={},
    rolls=(),
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


def test_clients_come_by_the_hour_of_the_day_which_begins_after_the_warm_up() -> None:
    warm_s, hour = 12 * 3600.0, 3600.0
    clients = arrivals(replace(DAY, sessions=40, hours=24.0), warm_s, random.Random(1))
    asked = [client.asked - warm_s for client in clients]
    evening, morning = (sum(h * hour <= at < (h + 2) * hour for at in asked) for h in (19, 7))
    assert evening > 4 * morning > 0  # of 1 and 0.15 of the busiest


def client(number: int, asked: float, length_s: float = 600.0) -> Client:
    return Client(number, length_s, DAY.cost_s, waits=True, asked=asked)


def test_a_session_that_is_moved_lasts_as_long_as_one_that_is_not() -> None:
    """The end that was told when it was first opened is not the end of what goes on elsewhere."""
    nobody = replace(DAY, sessions=1e-9, scale=Scale(2, 2))
    for loses in (False, True):
        world = World(nobody, Rules())
        world._at(WARM_S + 10, lambda world=world: world._ask(client(0, WARM_S + 10)))
        if loses:
            world._at(WARM_S + 310, world._lose_machine)
        world.run()
        assert world.tally.moved == loses
        assert world.tally.session_s == pytest.approx(600, abs=1e-3)


def test_who_is_edited_less_well_and_who_waits_are_counted_apart() -> None:
    work, now = DAY.sizes.work, [100.0]
    device = Device("e", 0, DAY, lambda load, streams: 0.5, lambda: now[0], degrade=True)  # type: ignore[arg-type]
    names = ("full", "mask", "slowed", "full", "slowed", "slowed", "mask")
    rungs = {f"{n}.0": Rung(name, work) for n, name in enumerate(names)}
    device.capacity.rung = rungs.__getitem__  # type: ignore[method-assign]
    device.clients = {stream: client(n, 0.0) for n, stream in enumerate(rungs)}
    tally = Tally()
    device.count(tally)
    assert tally == Tally()  # nothing was known of the time before
    now[0] += 10
    device.count(tally)
    found = tally.session_s, tally.late_s, tally.lowered_s, tally.slowed_s
    assert found == (70.0, 35.0, 20.0, 30.0)


def test_a_lost_machine_moves_its_sessions_and_loses_none() -> None:
    """All editors are of one machine: every session that is open moves, then goes on."""
    world = World(replace(DAY, lost_machines=1, scale=Scale(4, 4), sessions=6), Rules())
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


def test_sessions_are_edited_less_well_before_one_is_refused() -> None:
    work = DAY.sizes.work
    rungs = {
        Rung("full", work): 1.0,
        Rung("mask", work, True): 0.8,
        Rung("steps", work, True, True): 0.5,
    }
    day = replace(DAY, rungs=rungs, scale=Scale(2, 2), sessions=9, seed=2)
    assert day.means == Means(steps=4, masked=True)
    degraded, refused = simulate(day), simulate(day, VARIANTS["refuse at once"])
    assert degraded["refused_share"] < 0.7 * refused["refused_share"]
    assert degraded["most_sessions"] > refused["most_sessions"]
    assert degraded["lowered_share"] > 0.1
    assert degraded["late_share"] < 0.05
    assert refused["lowered_share"] == refused["slowed_share"] == refused["closed"] == 0


def test_the_rungs_are_worked_out_from_what_was_measured() -> None:
    """Of 100 ms outside of the networks, and 10 ms for each tenth of their tokens."""
    sizes = {"height": 480, "width": 832, "chunk_frames": 12, "steps": 4}
    mask = {"keep_ratio": 0.5, "pruned_steps": [1, 2]}
    times = {"dense": (1.0, 100.0), "mask cache": (0.8, 80.0)}
    report = {
        "config": {**sizes, "mask_cache": mask},
        "variants": {
            name: {"recomputed": share, "D": {"p50_ms": ms}, "V": {"p50_ms": 100.0 + ms}}
            for name, (share, ms) in times.items()
        },
        "load_s": 1.0,
        "start": {"cold": {"first_chunk_ms": 500.0}},
    }
    found = {rung.name: part for rung, part in measured(report)["rungs"].items()}
    # 0.7 of the tokens; then two whole steps and a refresh, 3 of 5 forwards.
    assert found == {
        "full": 1.0,
        "mask": pytest.approx(170 / 180),
        "steps": pytest.approx(160 / 180),
    }
    del report["variants"]["mask cache"]
    assert measured(report)["rungs"] == {}


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_chunks_are_late_where_the_load_is_above_one(streams: int) -> None:
    late = LateShare(DAY)
    assert late(0.0, 0) == 0
    assert late(HEADROOM, streams) < 0.01
    # Of twice what it can do half is late, and more where what is late was computed for nothing.
    assert late(2.0, streams) > 0.45
    assert late(HEADROOM, streams) < late(1.2, streams) <= late(1.5, streams)
    assert late(4.0, streams) <= 1.0, "each is late once"


def test_ways_to_decide_are_chosen_by_name() -> None:
    assert list(parse_ways(None)) == list(VARIANTS)
    assert parse_ways("ships, fullest first") == {
        name: VARIANTS[name] for name in ("ships", "fullest first")
    }
    with pytest.raises(UserError, match="--ways best is none; there are ships, refuse at once"):
        parse_ways("ships,best")


def test_the_usual_day_has_a_bad_version_at_noon_and_a_good_one_in_the_evening() -> None:
    assert usual_rolls(24.0) == (Roll(12 * 3600.0, kills=True), Roll(19 * 3600.0))
    assert usual_rolls(2.0)[1] == Roll(5700.0)


def test_a_version_that_kills_who_loads_it_costs_one_editor_and_a_good_one_reaches_all() -> None:
    rolls = Roll(600.0, kills=True), Roll(1800.0)
    day = replace(DAY, rolls=rolls, scale=Scale(8, 8), sessions=12, start_s=20.0, load_s=10.0)
    ships = simulate(day)
    assert ships["killed"] == 1
    assert ships["refused_share"] == ships["left_share"] == 0
    # One, one, two and four editors after each other, 8 to 15 s each.
    assert 32.0 <= ships["rolled_s"] <= 4 * 15.0 + 4 * 2
    one = simulate(day, VARIANTS["roll one by one"])
    assert one["killed"] == 1
    assert one["rolled_s"] >= 8 * 8.0
    together = simulate(day, VARIANTS["roll all at once"])
    assert together["killed"] >= 8
    assert together["rolled_s"] < ships["rolled_s"]
    assert together["moved"] > 4 * ships["moved"]


@pytest.mark.parametrize("kills", [True, False])
def test_editors_ask_what_to_load_until_all_have_what_is_served_and_nothing_else(
    kills: bool,
) -> None:
    day = replace(DAY, rolls=(Roll(60.0, kills),), scale=Scale(3, 3), sessions=1e-9)
    world = World(day, Rules())
    world.run()
    served = "v0" if kills else "v1"
    held = [list(device.capacity.models) for device in world._devices.values()]
    assert held == [[served]] * 3
    assert world._rolled_at is None
    assert world.tally.rolled_s == 0 if kills else world.tally.rolled_s > 3 * 8


def test_a_lost_editor_is_missed_and_a_quiet_one_is_not() -> None:
    """Nobody comes or goes for longer than an editor may be silent: all of them stay known."""
    world = World(replace(DAY, sessions=1e-9, scale=Scale(3, 3), hours=1.0), Rules())
    world.run()
    assert len(world.placement.editors) == 3
    world.now += 60.0
    assert world.placement.wanted() == 3
    assert world.placement.editors == []
