"""What `Placement` keeps between decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from serve.admission.admission import Editor, Seat
from serve.admission.decisions import Need, Scale
from serve.admission.fleet import KNOWN_DEMANDS
from serve.admission.rungs import Means
from serve.hub.placement import (
    ASKS_S,
    DECIDE_S,
    EDITOR_GONE_S,
    LEFT_S,
    RESERVED_S,
    START_S,
    Full,
    Placed,
    Placement,
    Waiting,
)
from serve.wire.protocol import RETRY_AFTER_S
from tests.serve.admission.made import SIZES, editor, request
from tests.serve.clock import Clock

COSTS = {SIZES: 0.21, replace(SIZES, halved=True): 0.105}


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def placement(clock: Clock) -> Placement:
    made = Placement(Scale(1, 4, delay_s=10.0), clock)
    made.report(editor("a"))
    return made


def test_what_was_placed_counts_before_the_editor_says_so(
    placement: Placement, clock: Clock
) -> None:
    """Two share 0.56 of 0.8; a third would need 0.84."""
    assert placement.ask(request("1")) == Placed("a")
    assert placement.ask(request("2")) == Placed("a")
    assert isinstance(placement.ask(request("3", waits=False)), Full)
    placement.released("2")
    assert placement.ask(request("4")) == Placed("a")
    for _ in range(2):  # which may have been said before they came
        placement.report(editor("a"))
        assert isinstance(placement.ask(request("5", waits=False)), Full)
    # A stream that never comes to its editor does not hold a place for ever.
    clock.now += RESERVED_S
    placement.report(editor("a"))
    assert placement.ask(request("5")) == Placed("a")


def test_an_editors_report_replaces_what_was_placed(placement: Placement) -> None:
    placement.ask(request("1"))
    placement.report(
        Editor("a", 12, 8, {"1": Seat("session-1", 0.7)}, {SIZES: 0.21})  # dearer than thought
    )
    assert [e.load for e in placement.editors] == [0.7]
    assert isinstance(placement.ask(request("2", waits=False)), Full)


def test_an_editor_that_a_front_cannot_reach_is_for_others(placement: Placement) -> None:
    """Unless no other has room: its front may be wrong."""
    placement.report(editor("b", 0.5))
    unreached = replace(request("1"), avoid=frozenset("a"))
    assert placement.ask(unreached) == Placed("b")
    assert placement.ask(request("2")) == Placed("a")
    assert placement.ask(replace(unreached, stream="3", session="3")) == Placed("a")


def test_the_queue_is_a_line(placement: Placement, clock: Clock) -> None:
    placement.report(editor("a", 0.7))
    assert [placement.ask(request(n)).place for n in "123"] == [1, 2, 3]  # type: ignore[union-attr]
    # Who lost an editor goes before who never had one.
    again = request("4", waits=False, again=True)  # whatever its client understands
    assert placement.ask(again).place == 1  # type: ignore[union-attr]
    assert placement.ask(request("3")).place == 4  # type: ignore[union-attr]
    # There is room for two: the first two have it, whoever asks first.
    placement.report(editor("a"))
    assert isinstance(placement.ask(request("3")), Waiting)
    assert isinstance(placement.ask(request("2")), Waiting)
    assert placement.ask(request("4", again=True)) == Placed("a")
    assert placement.ask(request("1")) == Placed("a")
    # Who does not ask any more is not in it.
    clock.now += LEFT_S - ASKS_S
    placement.report(editor("a", 0.7))
    placement.ask(request("2"))
    clock.now += ASKS_S
    assert placement.ask(request("5")).place == 2  # type: ignore[union-attr]


def test_who_gives_up_waiting_leaves_the_line(placement: Placement) -> None:
    placement.report(editor("a", 0.7))
    for name in "12":
        placement.ask(request(name))
    placement.released("1")
    assert placement.waiting == 1
    assert placement.ask(request("2")).place == 1  # type: ignore[union-attr]
    placement.report(editor("a"))
    assert placement.ask(request("2")) == Placed("a")


def test_what_is_expected_follows_lengths_and_starts(placement: Placement, clock: Clock) -> None:
    placement.ask(request("1"))
    clock.now += 8.0
    placement.released("1")
    placement.report(editor("a", 0.4, 0.4))
    placement.wanted()
    # One of two sessions, which last 8 s, ends in 4 s; an editor would take 30.
    assert placement.ask(request("2")) == Waiting(1, 4.0)
    assert placement.ask(request("3")) == Waiting(2, 8.0)


def test_who_waits_hears_when_the_editor_that_is_started_will_be_there(
    placement: Placement, clock: Clock
) -> None:
    placement.report(editor("a", 0.7))
    assert placement.ask(request("1")) == Waiting(1, START_S)
    clock.now += 9.0
    placement.report(editor("a", 0.7))
    assert placement.ask(request("1")) == Waiting(1, START_S - 9.0)
    for _ in range(3):
        clock.now += 9.0
        placement.report(editor("a", 0.7))
        told = placement.ask(request("1"))
    assert told == Waiting(1, 1.0)  # any moment
    placement.report(editor("b", 0.7))
    clock.now += DECIDE_S
    # The next is expected to take as long as this one did.
    assert placement.ask(request("1")) == Waiting(1, 36.0)


def test_refused_demand_starts_an_editor(placement: Placement, clock: Clock) -> None:
    placement.report(editor("a", 0.7))
    assert placement.wanted() == 1
    for name in "123":  # two of them fit in one
        assert isinstance(placement.ask(request(name, waits=False)), Full)
    clock.now += DECIDE_S
    assert placement.wanted() == 3
    clock.now += RETRY_AFTER_S
    placement.report(editor("a", 0.7))
    assert placement.wanted() == 3  # no start is broken off when nobody asks any more
    clock.now += 10.0
    placement.report(editor("a", 0.7))
    assert placement.wanted() == 1


def test_spare_editors_are_beside_those_that_are_needed(clock: Clock) -> None:
    made = Placement(Scale(1, 4, spare_editors=2), clock)
    made.report(editor("a", 0.5))
    assert made.wanted() == 3


def test_strangers_cannot_fill_what_is_remembered(clock: Clock) -> None:
    """They choose sizes and rates, and each is known to have no room."""
    made = Placement(Scale(1, 1), clock)
    made.report(editor("a", 0.7))
    for n in range(KNOWN_DEMANDS + 3):
        assert isinstance(made.ask(request(str(n), fps=16.0 + n)), Waiting)
        assert 0 < len(made._no_room) <= KNOWN_DEMANDS
        assert 0 < len(made._fleet._full) <= KNOWN_DEMANDS + 1


def test_an_empty_editor_goes_and_only_one(placement: Placement, clock: Clock) -> None:
    for name, shares in (("a", ()), ("b", (0.3,)), ("c", ())):
        placement.report(editor(name, *shares))
    placement._history = [Need(clock.now, 3)]
    assert not any(placement.may_go(name) for name in "abc")
    clock.now += 10.0
    for name, shares in (("a", ()), ("b", (0.3,)), ("c", ())):
        placement.report(editor(name, *shares))
    assert not placement.may_go("b")
    assert placement.may_go("c")
    assert placement.may_go("a")
    assert [e.name for e in placement.editors] == ["b"]
    assert placement.ask(request("1")) == Placed("b")
    assert not placement.may_go("b")
    # Who was silent and is heard again goes all the same: it gives its sessions back.
    clock.now += EDITOR_GONE_S
    assert placement.wanted() == 1
    for name in "ab":
        placement.report(editor(name))
    assert (placement.may_go("a"), placement.asked_to_go("a")) == (True, True)
    assert [e.name for e in placement.editors] == ["b"]


def test_an_editor_too_many_goes_when_its_last_session_has_gone(
    placement: Placement, clock: Clock
) -> None:
    clock.now += placement.scale.delay_s
    placement.report(editor("a", 0.3))
    placement.report(editor("b", 0.1))  # both would fit in one
    assert placement.wanted() == 1
    assert not any(placement.may_go(name) for name in "ab")
    placement.released("b0")
    assert placement.may_go("b")


def test_a_closing_editor_takes_a_stream_only_where_no_other_can(
    placement: Placement, clock: Clock
) -> None:
    clock.now += placement.scale.delay_s
    placement.report(editor("a", 0.3))
    placement.report(editor("b", 0.1))
    assert placement.ask(request("1")) == Placed("a")  # both would fit in one: b is to be emptied
    assert placement.ask(request("2")) == Placed("b")


def test_who_is_before_one_in_the_line_does_not_take_a_closing_editor_either(
    placement: Placement, clock: Clock
) -> None:
    """It will have the place at a, which the next must leave to it."""
    clock.now += placement.scale.delay_s
    for name in "ab":
        placement.report(editor(name, 0.7))
    assert placement.ask(request("1")) == Waiting(1, START_S)
    for name, shares in (("a", (0.5,)), ("b", ())):
        placement.report(editor(name, *shares))
    placement._history.clear()
    clock.now += DECIDE_S
    assert placement.wanted() == 1  # b closes
    assert placement.ask(request("2")) == Placed("b")
    assert placement.ask(request("1")) == Placed("a")


def test_without_bounds_to_scale_between_nobody_goes(clock: Clock) -> None:
    placement = Placement(Scale(2, 2, delay_s=0.0), clock)
    placement.report(editor("a"))
    placement.report(editor("b"))
    placement.report(editor("c"))
    assert not any(placement.may_go(name) for name in "abc")


def test_editors_that_stop_take_nothing(placement: Placement, clock: Clock) -> None:
    placement.report(editor("a", 0.1))
    placement.report(editor("b"))  # where it would go
    placement.gone(frozenset("b"))
    assert placement.ask(request("1")) == Placed("a")
    placement.gone(frozenset("ab"))
    assert isinstance(placement.ask(request("3")), Waiting)
    placement.gone(frozenset("a"))
    assert placement.ask(request("3")) == Placed("b")
    clock.now += 11.0
    assert isinstance(placement.ask(request("2")), Waiting)  # a has not reported: it is gone


def test_a_session_is_over_also_where_its_editor_stops(placement: Placement) -> None:
    placement.report(editor("b", 0.3))
    placement.gone(frozenset("b"))
    placement.released("b0")
    for load in (0.0, 0.2):  # and it goes on with what it says since
        placement.gone(frozenset())
        assert {each.name: each.load for each in placement.editors} == {"a": 0.0, "b": load}
        placement.report(editor("b", 0.2))


def test_an_editor_that_was_stopped_and_is_gone_does_not_come_back(
    placement: Placement, clock: Clock
) -> None:
    """Serve names it no more, and neither does it say anything itself."""
    placement.report(editor("b"))
    placement.gone(frozenset("b"))
    clock.now += EDITOR_GONE_S
    placement.report(editor("a", 0.7))
    assert isinstance(placement.ask(request("1")), Waiting)
    placement.gone(frozenset())
    assert [each.name for each in placement.editors] == ["a"]
    assert isinstance(placement.ask(request("1")), Waiting)


def test_a_hub_that_has_heard_of_no_editor_refuses_nobody(clock: Clock) -> None:
    """It has just been started again, and the editors that work say so within a second."""
    placement = Placement(Scale(1, 4), clock)
    assert isinstance(placement.ask(request("1", waits=False)), Waiting)
    placement.report(editor("a", 0.7))
    assert isinstance(placement.ask(request("1", waits=False)), Full)
    clock.now += EDITOR_GONE_S
    assert isinstance(placement.ask(request("2", waits=False)), Full)  # it knows that all are gone


def test_a_hub_started_again_waits_for_the_word_of_all_editors(clock: Clock) -> None:
    """The first to report may be full while others have room."""
    placement = Placement(Scale(1, 4), clock, settle_s=2.0)
    clock.now += 60.0  # nobody has said anything yet
    placement.report(editor("a", 0.7))
    assert isinstance(placement.ask(request("1", waits=False)), Waiting)
    clock.now += 0.9
    placement.report(editor("b"))
    assert placement.ask(request("1", waits=False)) == Placed("b")
    placement.report(editor("b", 0.7))
    clock.now += 1.2
    assert isinstance(placement.ask(request("2", waits=False)), Full)


@pytest.mark.parametrize(("delay_s", "seconds"), [(30.0, 30), (0.0, 2)])
def test_a_hub_started_again_asks_nobody_to_leave_before_the_delay_is_over(
    clock: Clock, delay_s: float, seconds: int
) -> None:
    """It does not know how long they have been too many, nor at once how many there are."""
    placement = Placement(Scale(1, 4, delay_s=delay_s), clock, settle_s=2.0)
    for _ in range(seconds):
        for name in "abc":
            placement.report(editor(name))
        assert not any(placement.may_go(name) for name in "abc")
        clock.now += 1.0
    assert [placement.may_go(name) for name in "abc"] == [True, True, False]


def test_a_hub_started_again_lowers_nobodys_quality_before_all_editors_have_spoken(
    clock: Clock,
) -> None:
    placement = Placement(Scale(1, 4), clock, settle_s=2.0)
    full = Editor("a", 12, 8, {"x": Seat("x", 0.7, 0.3)}, COSTS, means=Means(steps=4))
    placement.report(full)
    assert isinstance(placement.ask(request("1", waits=False)), Waiting)
    clock.now += 1.9
    placement.report(full)
    assert isinstance(placement.ask(request("1", waits=False)), Waiting)
    clock.now += 0.1
    assert placement.ask(request("1", waits=False)) == Placed("a")


def test_a_thousand_editors_are_counted_less_often(clock: Clock) -> None:
    """It takes as long as there are editors: every 2.5 s is enough for a thousand."""
    placement = Placement(Scale(1, 2000), clock)
    for number in range(1000):
        placement.report(editor(f"e{number}", 0.7))
    assert placement.wanted() == 1000
    placement.ask(request("1", waits=False))
    clock.now += 2.4
    assert placement.wanted() == 1000
    clock.now += 0.2
    assert placement.wanted() == 1001


class PlacementMachine(RuleBasedStateMachine):
    """What is remembered to have found no room changes no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock(100.0)
        scale = Scale(1, 8, delay_s=3.0)
        self.placement, self.plain = Placement(scale, self.clock), Placement(scale, self.clock)

    @rule(
        name=st.sampled_from("abc"),
        shares=st.lists(st.sampled_from([0.1, 0.3, 0.5]), max_size=3),
        cost=st.sampled_from([0.21, 0.4]),
    )
    def report(self, name: str, shares: list[float], cost: float) -> None:
        for placement in (self.placement, self.plain):
            placement.report(editor(name, *shares, cost=cost))

    @rule(
        stream=st.sampled_from("xyz"),
        fps=st.sampled_from([4.0, 16.0]),
        waits=st.booleans(),
        again=st.booleans(),
    )
    def ask(self, stream: str, fps: float, waits: bool, again: bool) -> None:
        asked = request(stream, waits=waits, again=again, fps=fps)
        self.plain._no_room.clear()
        self.plain._fleet._full.clear()
        assert self.placement.ask(asked) == self.plain.ask(asked)

    @rule(stream=st.sampled_from(["x", "y", "z", "a0", "b1"]))
    def released(self, stream: str) -> None:
        for placement in (self.placement, self.plain):
            placement.released(stream)

    @rule(stopped=st.frozensets(st.sampled_from("abc"), max_size=2))
    def gone(self, stopped: frozenset[str]) -> None:
        for placement in (self.placement, self.plain):
            placement.gone(stopped)

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds


TestPlacement = PlacementMachine.TestCase
TestPlacement.settings = settings(max_examples=40, stateful_step_count=20)
