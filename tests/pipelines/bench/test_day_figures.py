"""What a simulated day is made of and comes to, by hand: clients, editors, decisions, figures."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import fields, replace
from io import StringIO
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipelines.bench.simulation.arrivals import NAME, Client, arrivals
from pipelines.bench.simulation.day import (
    ALL,
    VARIANTS,
    Day,
    Roll,
    Rules,
    anyone,
    fullest,
    measured,
)
from pipelines.bench.simulation.late import LateShare
from pipelines.bench.simulation.simulated_editor import Device
from pipelines.bench.simulation.tally import Tally, _quantile, table
from pipelines.bench.simulation.world import PATIENCE_S, REPORT_S, WARM_S, World, _machines
from serve.admission.admission import Editor, Request, Seat, Sizes
from serve.admission.decisions import Scale
from serve.admission.fleet import emptiest
from serve.admission.rungs import Rung
from serve.hub.placement import ASKS_S, EDITOR_GONE_S, Full, Placed, Retired, Waiting
from tests.pipelines.bench.test_simulation import DAY, client

WORK = DAY.sizes.work


def test_a_days_figures_by_hand() -> None:
    tally = Tally(
        asked=10, refused=2, left=1, opened=7, moved=3, waited=[5.0, 1.0, 3.0], gaps=[9.0, 4.0],
        session_s=400.0, late_s=40.0, lowered_s=100.0, slowed_s=20.0, closed=6, rolled_s=77.0,
        killed=8, editor_s=7200.0, most_editors=11, most_sessions=12,
    )  # fmt: skip
    assert tally.to_dict() == {
        "asked": 10,
        "refused_share": 0.2,
        "left_share": 0.1,
        "waited_s_p50": 3.0,
        "waited_s_p99": 5.0,
        "late_share": 0.1,
        "lowered_share": 0.25,
        "slowed_share": 0.05,
        "closed": 6,
        "rolled_s": 77.0,
        "killed": 8,
        "moved": 3,
        "gap_s_p99": 9.0,
        "editor_hours": 2.0,
        "sessions_per_editor": pytest.approx(400 / 7200),
        "most_editors": 11,
        "most_sessions": 12,
    }
    assert set(Tally().to_dict().values()) == {0}
    short = Tally(asked=1, refused=1, session_s=0.5, late_s=0.25, editor_s=0.25).to_dict()
    shares = ("refused_share", "late_share", "sessions_per_editor")
    assert [short[name] for name in shares] == [1.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("count", "share", "found"), [(0, 0.5, 0), (1, 0.99, 1), (4, 0.5, 3), (100, 0.99, 100)]
)
def test_a_quantile_is_one_of_the_values(count: int, share: float, found: float) -> None:
    assert _quantile([float(n) for n in range(1, count + 1)], share) == found


def test_every_figure_has_its_row() -> None:
    names = Tally().to_dict()
    results = {way: {name: m * (n + 1) / 10 for n, name in enumerate(names)}
               for way, m in (("ships", 1.0), ("other", 3.0))}  # fmt: skip
    text = StringIO()
    day = replace(DAY, hours=2.0, sessions=40, fps=12.0, cost_s=0.25, scale=Scale(1, 7))
    view = table(day, results)
    assert view.title == (
        "2 h, at most about 40 sessions of 12 fps at once, 250 ms a chunk, up to 7 editors"
    )
    assert [column.header for column in view.columns] == ["", "ships", "other"]
    Console(file=text, width=200).print(view)
    cells = {}
    for line in text.getvalue().splitlines():
        if "│" in line:
            label, *rest = (cell.strip() for cell in line.strip("│").split("│"))
            cells[label] = rest
    rows = {
        "sessions asked": ("{asked:.0f}",),
        "refused": ("{refused_share:.2%}",),
        "gave up waiting": ("{left_share:.2%}",),
        "waited P50 / P99 s": ("{waited_s_p50:.1f} / {waited_s_p99:.1f}",),
        "chunks late": ("{late_share:.2%}",),
        "edited less well": ("{lowered_share:.2%}",),
        "lossless slowed": ("{slowed_share:.2%}",),
        "closed too slow": ("{closed:.0f}",),
        "version rolled out in s": ("{rolled_s:.0f}",),
        "editors a version killed": ("{killed:.0f}",),
        "moved": ("{moved:.0f}",),
        "gap P99 s": ("{gap_s_p99:.1f}",),
        "editor hours": ("{editor_hours:.0f}",),
        "sessions an editor": ("{sessions_per_editor:.2f}",),
        "editors at most": ("{most_editors:.0f}",),
    }
    assert cells == {
        label: [form.format(**found) for found in results.values()]
        for label, (form,) in rows.items()
    }


def test_clients_are_as_many_as_long_and_as_dear_as_the_day_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At one hour of the day all day long; a mean of e^(1/2) times ten minutes makes 25 a day of
    one session at once, and so many thousand of a hundred."""
    day = replace(DAY, sessions=100, hours=24.0, lossless=0.25, cost_s=0.5)
    monkeypatch.setattr("pipelines.bench.simulation.arrivals.COST_SPREAD", 0.8)
    some = list(arrivals(day, 0.0, random.Random(3)))
    shares = [0.15 + 0.85 * ((1 + math.cos(2 * math.pi * n / 1000)) / 2) ** 1.5
              for n in range(1000)]  # fmt: skip
    mean_s = 600.0 * math.exp(0.5)
    assert len(some) == pytest.approx(100 * 86400 / mean_s * statistics.mean(shares), rel=0.05)
    assert [one.number for one in some] == list(range(len(some)))
    assert all(a.asked < b.asked for a, b in pairwise(some))
    assert some[-1].asked < 86400
    assert statistics.median(one.length_s for one in some) == pytest.approx(600, rel=0.06)
    assert statistics.mean(one.length_s for one in some) == pytest.approx(mean_s, rel=0.08)
    assert statistics.mean(one.cost_s for one in some) == pytest.approx(0.5, rel=0.05)
    logs = [math.log(one.cost_s) for one in some]
    assert statistics.stdev(logs) == pytest.approx(0.8, rel=0.06)
    assert statistics.mean(one.waits for one in some) == pytest.approx(0.5, abs=0.03)
    assert statistics.mean(not one.live for one in some) == pytest.approx(0.25, abs=0.03)


def test_what_a_client_asks_for_is_the_days_and_its_own() -> None:
    day = replace(DAY, sizes=Sizes((64, 96), (32, 48)), fps=12.0)
    one = Client(4, 60.0, 0.1, waits=True, asked=5.0, live=False)
    assert one.request(day) == Request(
        "4.0", "s4", day.sizes, 12.0, 0, waits=True, again=False, live=False
    )
    one.epoch, one.again, one.model, one.live = 2, True, "v1", True
    sizes = replace(day.sizes, model="v1")
    assert one.request(day) == Request(
        "4.2", "s4", sizes, 12.0, 2, waits=True, again=True, live=True, name=NAME
    )
    opening = one.opening(day)
    found = {name: getattr(opening, name) for name in (
        "session", "width", "height", "fps", "mode", "stream", "work_size", "version")}  # fmt: skip
    assert found == {"session": "s4", "width": 96, "height": 64, "fps": 12.0, "mode": "live",
                     "stream": "4.2", "work_size": "48x32", "version": "v1"}  # fmt: skip
    one.live = False
    assert one.opening(day).mode == "lossless"


def report(**config: Any) -> dict[str, Any]:
    return {
        "config": {"height": 480, "width": 832, "chunk_frames": 9, "steps": 4} | config,
        "variants": {"dense": {"V": {"p50_ms": 250.0}}},
        "load_s": 20.0,
        "start": {"cold": {"first_chunk_ms": 1500.0}},
    }


def test_a_day_is_of_what_was_measured() -> None:
    found = measured(report())
    assert found == {"cost_s": 0.25, "chunk_frames": 9, "sizes": Sizes((480, 832), (480, 832)),
                     "start_s": 21.5, "load_s": 21.5, "rungs": {}}  # fmt: skip
    small = report(work_height=240, work_width=416)
    small["variants"]["mask cache"] = {"V": {"p50_ms": 100.0}}
    found = measured(small)
    assert (found["cost_s"], found["sizes"].work) == (0.1, (240, 416))  # what a user gets


def test_ways_to_decide_are_what_their_names_say() -> None:
    changes = {
        name: {f.name: getattr(way, f.name) for f in fields(Rules)
               if getattr(way, f.name) != getattr(Rules(), f.name)}
        for name, way in VARIANTS.items()
    }  # fmt: skip
    paces = [changes[f"roll {name}"].pop("pace") for name in ("one by one", "all at once")]
    assert [pace(5) for pace in paces] == [1, ALL]
    assert changes == {
        "ships": {}, "refuse at once": {"degrade": False},
        "fullest first": {"rank": fullest, "together": False},
        "lower anywhere": {"together": False}, "any with room": {"rank": anyone},
        "down after 60 s": {"delay_s": 60.0}, "2 % spare": {"spare": 0.02},
        "5 % spare": {"spare": 0.05}, "roll one by one": {}, "roll all at once": {},
    }  # fmt: skip
    assert Rules().rank is emptiest
    editors = [Editor(n, 12, 8, {f"{n}{k}": Seat("s", 0.1) for k in range(c)})
               for n, c in (("a", 1), ("b", 3), ("c", 3), ("d", 0))]  # fmt: skip
    assert [editor.name for editor in sorted(editors, key=fullest)] == ["b", "c", "a", "d"]


@pytest.mark.parametrize(
    ("rules", "spare", "delay"),
    [(Rules(), 0, 300.0), (Rules(spare=0.05), 2, 300.0), (Rules(delay_s=60.0), 0, 60.0)],
)
def test_a_way_to_decide_reaches_what_decides(rules: Rules, spare: int, delay: float) -> None:
    world = World(replace(DAY, scale=Scale(1, 40, delay_s=300.0)), rules)
    assert world.scale == Scale(1, 40, spare_editors=spare, delay_s=delay)
    rungs = {Rung("full", WORK): 1.0}
    for day, degrades in ((DAY, False), (replace(DAY, rungs=rungs), True)):
        assert World(day, rules)._degrade is degrades
        assert World(day, replace(rules, degrade=False))._degrade is False
    assert [_machines(Scale(1, n)) for n in (1, 15, 16, 40)] == [1, 1, 2, 5]


class Answers:
    """A hub that answers a client as it is told, and hears whom it gives up."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.gave_up: list[str] = []

    def ask(self, request: Any) -> Any:
        return self.answers.pop(0)

    def released(self, stream: str) -> None:
        self.gave_up.append(stream)


EMPTY = replace(DAY, sessions=1e-9, scale=Scale(0, 0))


def world_that(*answers: Any) -> World:
    world = World(EMPTY, Rules())
    world.placement = Answers(*answers)  # type: ignore[assignment]
    return world


def test_what_changes_at_an_editor_is_reported_once_a_while() -> None:
    world = world_that()
    device: Any = SimpleNamespace(count=lambda tally: None, report_due=False, name="gone by then")
    for _ in range(3):
        world._changed(device)
    assert len(world._events) == 1
    world._report(device)  # after which there may be another
    world._changed(device)
    assert len(world._events) == 2


def test_who_is_refused_is_counted_and_does_not_come_back() -> None:
    world = world_that(Full())
    world._ask(client(0, 0.0))
    assert (world.tally.refused, world._events) == (1, [])


def test_who_asks_for_a_version_that_is_gone_asks_for_the_one_in_its_place_at_once() -> None:
    world = world_that(Retired("v2"), Full())
    one = client(0, 0.0)
    one.model = "v1"
    world._ask(one)
    assert (one.model, world.tally.refused) == ("v2", 1)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("waited", [0.0, PATIENCE_S - 0.1, PATIENCE_S])
def test_who_waits_asks_again_until_its_patience_ends_and_who_lost_its_editor_for_ever(
    again: bool, waited: float
) -> None:
    world = world_that(Waiting(1, 9.0))
    one = client(0, 10.0)
    one.again, world.now = again, 10.0 + waited
    world._ask(one)
    gives_up = waited == PATIENCE_S and not again
    assert world.tally.left == gives_up
    assert world.placement.gave_up == ["0.0"] * gives_up  # type: ignore[attr-defined]
    assert [at for at, *_ in world._events] == ([] if gives_up else [world.now + ASKS_S])


def device(day: Day, now: list[float], **given: Any) -> Device:
    return Device("e", 3, day, LateShare(day), lambda: now[0], **{"degrade": True} | given)


def test_waits_gaps_and_most_sessions_are_those_of_who_was_opened() -> None:
    world = world_that(*[Placed("e")] * 3)
    one, two = client(0, 0.0, length_s=50.0), client(1, 4.0)
    world._devices["e"] = editor = device(EMPTY, [0.0])
    editor.learn("")
    world.now = 3.0
    world._ask(one)
    world.now = 10.0
    world._ask(two)
    assert (world.tally.opened, world.tally.waited) == (2, [3.0, 6.0])
    assert (world._sessions, world.tally.most_sessions) == (2, 2)
    assert one.opened == 3.0
    world.now = 23.0
    world._lose(editor)
    assert (world._sessions, world.tally.moved) == (0, 2)
    assert (one.length_s, one.epoch, one.again) == (30.0, 1, True)  # twenty of fifty are over
    assert world.tally.editor_s == 23.0
    world._devices["e"] = again = device(EMPTY, [23.0])
    again.learn("")
    world.now = 30.0
    world._ask(one)
    assert (world.tally.opened, world.tally.gaps) == (2, [7.0])
    assert world.tally.most_sessions == 2


def test_who_cannot_be_kept_is_closed_and_an_editor_is_looked_at_when_it_may_decide_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_that(Placed("e"), Placed("e"))
    world._devices["e"] = editor = device(EMPTY, [0.0])
    editor.learn("")
    for number in (0, 1):
        world._ask(client(number, 0.0))
    world.now, said = 50.0, list[Any]()
    monkeypatch.setattr(world, "_say", lambda *given: said.append(given))
    world._events.clear()
    monkeypatch.setattr(editor, "decide", lambda: ("1.0", 90.0))
    editor.report_due = False
    world._report(editor)
    assert (world.tally.closed, list(editor.clients)) == (1, ["0.0"])
    assert world.placement.gave_up == ["1.0"]  # type: ignore[attr-defined]
    assert said == [(editor, editor.said)]
    assert [at for at, *_ in world._events] == [50.0 + REPORT_S], "somebody went"
    for again, due in ((90.0, [90.0]), (50.0, [50.0 + REPORT_S]), (math.inf, [])):
        world._events.clear()
        editor.report_due = False
        monkeypatch.setattr(editor, "decide", lambda again=again: (None, again))
        world._report(editor)
        assert [at for at, *_ in world._events] == due


def test_a_version_is_known_to_kill_just_before_its_editor_is_taken_for_gone() -> None:
    """As the hub's own note of it comes; the version is not tried anywhere else until then."""
    world = World(replace(EMPTY, rolls=(Roll(1.0, kills=True),)), Rules())
    world._devices["e"] = editor = device(EMPTY, [0.0])
    world.catalog.point(NAME, world._version(1), 1.0, None)
    editor.loading, editor.said_at, world.now = "v1", 4.0, 6.0
    world._loaded(editor)
    assert (world.tally.killed, world._devices) == (1, {})
    ((at, _, act),) = world._events
    assert 0 < 4.0 + EDITOR_GONE_S - at < 0.1
    assert not world.catalog.failed
    act()
    assert world.catalog.failed == {"v1": "editor e died of it"}


def test_an_editor_that_is_not_there_or_has_no_room_is_asked_again_later() -> None:
    world = world_that(Placed("gone"), Placed("e"))
    world._devices["e"] = device(replace(EMPTY, max_sessions=0), [0.0])
    for number in range(2):
        world._ask(client(number, 0.0))
    assert world.tally.opened == 0
    assert [at for at, *_ in world._events] == [ASKS_S] * 2


@pytest.mark.parametrize("number", [0, 1, 2])
def test_only_a_version_that_kills_does(number: int) -> None:
    day = replace(DAY, rolls=(Roll(1.0, kills=True), Roll(2.0)))
    assert World(day, Rules())._kills(f"v{number}") is (number == 1)


def test_editors_that_come_are_counted() -> None:
    world = World(EMPTY, Rules())
    world._starting = 2
    for number in (1, 2):
        world._ready()
        assert (world.tally.most_editors, world._starting) == (number, 2 - number)


def test_the_hour_before_the_day_counts_for_nothing() -> None:
    world = World(replace(EMPTY, scale=Scale(2, 2), hours=1.0), Rules())
    there: list[int] = []
    world._at(1.0, lambda: there.append(len(world._devices)))
    world.run()
    assert there == [2], "the least of them are there from the beginning"
    assert world.tally.editor_s == pytest.approx(2 * 3600)
    assert world.now == WARM_S + 3600
    assert (world.tally.most_editors, world.tally.asked) == (2, 0)
