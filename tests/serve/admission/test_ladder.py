"""Who is edited less well, and when again better: tables, and what holds whatever comes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.admission import ladder
from serve.admission.admission import HEADROOM
from serve.admission.ladder import (
    HIGH,
    LONGEST_UP_S,
    LOW,
    OVER_S,
    UP_S,
    Calm,
    Held,
    decide,
    load_of,
)
from serve.admission.rungs import FULL, Means, Rung, rungs, slowed

WIDE = (480, 832)
MODEL = Means(trained=((240, 416), WIDE), steps=4, masked=True)


def names(found: tuple[Rung, ...]) -> list[tuple[str, tuple[int, int], bool, bool]]:
    return [(rung.name, rung.work, rung.sparing, rung.halved) for rung in found]


def test_a_live_sessions_rungs_are_what_its_model_allows() -> None:
    assert names(rungs(MODEL, WIDE, WIDE, live=True)) == [
        ("full", WIDE, False, False),
        ("mask", WIDE, True, False),
        ("size", (240, 416), True, False),
        ("steps", (240, 416), True, True),
    ]
    # The largest of those that are smaller comes first, whatever the order of the card.
    trained = ((120, 208), (240, 416))
    for means in (Means(trained), Means(trained[::-1])):
        works = [rung.work for rung in rungs(means, WIDE, WIDE, live=True)]
        assert works == [WIDE, (240, 416), (128, 208)]
    # Nothing smaller than it is edited at already, and in the frames' own shape.
    assert names(rungs(MODEL, WIDE, (240, 416), live=True))[2][0] == "steps"
    tall = rungs(Means(trained=((240, 416),)), (832, 480), (832, 480), live=True)
    assert names(tall) == [
        ("full", (832, 480), False, False), ("size", (416, 240), False, False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("means", "live", "found"),
    [
        (MODEL, False, ["full", "slowed"]),  # never less well
        (replace(MODEL, steps=3), True, ["full", "mask", "size"]),
        (replace(MODEL, masked=False), True, ["full", "size", "steps"]),
        (replace(MODEL, trained=(WIDE,)), True, ["full", "mask", "steps"]),
        (replace(MODEL, trained=((120, 208), (240, 416))), True,
         ["full", "mask", "size", "size", "steps"]),
        (Means(), True, ["full"]),
    ],
)  # fmt: skip
def test_what_a_model_lacks_is_no_rung(means: Means, live: bool, found: list[str]) -> None:
    assert [rung.name for rung in rungs(means, WIDE, WIDE, live=live)] == found


def test_a_slowed_session_has_a_chunk_every_five_seconds() -> None:
    assert slowed(0.4, 0.3) == pytest.approx(0.06)
    assert slowed(0.01, 0.3) == 0.01


def live(name: str, *shares: float, rung: int = 0, since: float = 0.0) -> Held:
    return Held(name, True, rung, shares, since)


def lossless(name: str, *shares: float, rung: int = 0, since: float = 0.0) -> Held:
    return Held(name, False, rung, shares, since)


A, B = live("a", 0.5, 0.4, 0.2, 0.1), live("b", 0.45, 0.36, 0.18, 0.09)
FILE = lossless("f", 0.4, 0.06)


@pytest.mark.parametrize(
    ("held", "then"),
    [
        ([A], {"a": 0}),
        ([live("a", 0.85, 0.4)], {"a": 0}),  # the border
        # 0.95: one goes down for the other, both while they differ, until 0.8 are enough.
        ([A, B], {"a": 1, "b": 1}),
        ([A, replace(B, rung=1)], {"a": 1, "b": 1}),
        ([A, B, live("c", 0.4, 0.3, 0.15, 0.05)], {"a": 2, "b": 2, "c": 1}),
        # A file waits before anybody sees it.
        ([A, FILE], {"a": 0, "f": 1}),
        ([A, B, FILE], {"a": 2, "b": 1, "f": 1}),
        # Who is edited best, not who takes most.
        ([live("a", 0.3, 0.1), live("b", 0.9, 0.6, 0.3, rung=1)], {"a": 1, "b": 1}),
        # Of those who are edited alike, who takes most; of these the first by name.
        ([live("a", 0.2, 0.1), live("b", 0.7, 0.4)], {"a": 0, "b": 1}),
        ([live("b", 0.45, 0.3), live("a", 0.45, 0.3)], {"b": 0, "a": 1}),
        # A rung that saves nothing is passed over.
        ([live("a", 0.9, 0.9, 0.5)], {"a": 2}),
        ([live("a", 0.9, 0.899)], {"a": 0}),
        # The bottom is not enough.
        ([live("a", 3.0, 2.0, 1.0)], {"a": 2}),
    ],
)
def test_down_at_once_and_no_further_than_it_needs(held: list[Held], then: dict[str, int]) -> None:
    decision = decide(held, Calm(), 100.0)
    assert decision.rungs == then
    changed = then != {session.name: session.rung for session in held}
    assert (decision.calm.since == 100.0) is changed


def test_up_one_at_a_time_when_there_is_room_and_calm() -> None:
    held = [replace(A, rung=2), replace(B, rung=1), replace(FILE, rung=1)]
    assert load_of(held) == pytest.approx(0.62)
    calm, found = Calm(since=100.0), []
    for now in (100 + UP_S - 0.1, 100 + UP_S, 100 + UP_S + 1, 100 + 2 * UP_S, 100 + 4 * UP_S):
        decision = decide(held, calm, now)
        held = [replace(session, rung=decision.rungs[session.name]) for session in held]
        calm = decision.calm
        found.append(tuple(session.rung for session in held))
    # a would come to 0.82, b to 0.71, the file to 0.96: nobody, until somebody leaves.
    assert found == [(2, 1, 1)] * 5
    held = held[:1] + held[2:]
    decision = decide(held, calm, 200.0)
    assert decision.rungs == {"a": 1, "f": 1}  # the live one first: 0.4 + 0.06
    held = [replace(session, rung=decision.rungs[session.name]) for session in held]
    assert decide(held, decision.calm, 200.0 + UP_S).rungs == {"a": 0, "f": 1}
    alone = [replace(FILE, rung=1)]
    assert decide(alone, decision.calm, 200.0 + UP_S).rungs == {"f": 0}


@pytest.mark.parametrize(
    ("held", "then"),
    [
        # Who is edited worst, though another takes less.
        ([live("a", 0.2, 0.1, rung=1), live("b", 0.4, 0.3, 0.2, rung=2)], {"a": 1, "b": 1}),
        ([live("a", 0.3, 0.2, rung=1), live("b", 0.2, 0.1, rung=1)], {"a": 1, "b": 0}),
        ([live("b", 0.2, 0.1, rung=1), live("a", 0.2, 0.1, rung=1)], {"a": 0, "b": 1}),
        # And the next, where there is no room for the first.
        ([live("a", 0.9, 0.1, rung=1), live("b", 0.2, 0.15, rung=1)], {"a": 1, "b": 0}),
    ],
)
def test_of_those_who_could_go_up_one_does(held: list[Held], then: dict[str, int]) -> None:
    assert decide(held, Calm(), 100.0).rungs == then


def test_nobody_goes_up_soon_after_somebody_came_down() -> None:
    held = [replace(A, rung=1)]
    assert decide(held, Calm(since=100.0, rose=0.0), 100 + UP_S - 0.1).rungs == {"a": 1}
    assert decide(held, Calm(since=100.0, rose=0.0), 100 + UP_S).rungs == {"a": 0}


def test_up_to_the_rung_that_it_came_from() -> None:
    """Not to one that saves nothing."""
    held = [live("a", 0.6, 0.6, 0.3, rung=2)]
    assert decide(held, Calm(), 0.0).rungs == {"a": 0}


def test_going_up_in_vain_is_tried_less_and_less_often() -> None:
    """A cost that was guessed too low: what it thinks is 0.6 is 0.95."""
    calm, tries, rung, now = Calm(), [], 0, 0.0
    while now < 600:
        shares = (0.95, 0.4) if rung == 0 else (0.6, 0.4)
        decision = decide([live("a", *shares, rung=rung)], calm, now)
        if decision.rungs["a"] < rung:
            tries.append(now)
        rung, calm, now = decision.rungs["a"], decision.calm, now + 1
    waits = [b - a for a, b in pairwise(tries)]
    assert len(tries) <= 6
    assert waits == sorted(waits)
    assert waits[-1] > 10 * UP_S


@pytest.mark.parametrize(
    ("up_s", "rose", "then"),
    [
        (UP_S, 100 - 2 * UP_S + 0.1, 2 * UP_S),  # it had hardly gone up
        (UP_S, 100 - 2 * UP_S, UP_S),  # the border: that was long enough
        (40.0, 100 - 79.0, 80.0),
        (40.0, 100 - 80.0, 40.0),
        (LONGEST_UP_S, 99.0, LONGEST_UP_S),
    ],
)
@pytest.mark.parametrize("down_since", [False, True])
def test_who_had_to_come_down_again_waits_twice_as_long(
    up_s: float, rose: float, then: float, down_since: bool
) -> None:
    """Whether somebody else came down in between says nothing of it."""
    calm = decide([A, B], Calm(99.5 if down_since else rose, up_s, rose), 100.0).calm
    assert calm == Calm(since=100.0, up_s=then, rose=rose)


@pytest.mark.parametrize("came_down", [0.0, 200.0])
@pytest.mark.parametrize(("ago", "then"), [(2 * LONGEST_UP_S, 80.0), (641.0, UP_S)])
def test_what_was_in_vain_is_forgotten_after_a_long_calm(
    ago: float, then: float, came_down: float
) -> None:
    decision = decide([replace(A, rung=1)], Calm(came_down, up_s=80.0, rose=0.0), ago)
    assert decision.rungs == {"a": 0}
    assert decision.calm == Calm(since=ago, up_s=then, rose=ago)


@pytest.mark.parametrize(
    ("held", "closed"),
    [
        ([live("a", 0.6, since=1), live("b", 0.6, since=2)], "b"),  # the newest
        ([live("a", 0.6, since=2), live("b", 0.6, since=1)], "a"),
        ([live("b", 0.6, since=1), live("a", 0.6, since=1)], "b"),  # as new: one and the same
        ([live("a", 1.2, since=2), lossless("f", 0.4, 0.06, since=1, rung=1)], "f"),
        ([live("a", 0.6), live("b", 0.6, 0.3)], None),  # who can go down does
        ([live("a", 0.5), live("b", 0.5)], None),  # the border: the whole accelerator
        ([live("a", 3.9)], None),  # alone, and something like live
        ([live("a", 4.0)], None),
        ([live("a", 4.1)], "a"),
        ([lossless("f", 9.0, 5.0, rung=1)], None),  # a file alone takes as long as it takes
    ],
)
def test_who_cannot_be_kept_is_closed_after_a_while(held: list[Held], closed: str | None) -> None:
    calm, told = Calm(), []
    for now in (0.0, OVER_S - 0.1, OVER_S):
        decision = decide(held, calm, now)
        calm = decision.calm
        told.append(decision.close)
    assert told == [None, None, closed]
    assert calm.over is None or closed is None  # the next one has as long


def test_a_short_excess_closes_nobody() -> None:
    calm = Calm()
    for now in range(100):
        cost = 0.6 if now % 8 else 0.4
        decision = decide([live("a", cost), live("b", cost)], calm, float(now))
        calm = decision.calm
        assert decision.close is None


sessions = st.builds(
    lambda live, first, saved, rung, since: Held(
        "", live, min(rung, len(saved)), tuple(_falling(first, saved)), since
    ),
    st.booleans(),
    st.floats(0.01, 1.5),
    st.lists(st.floats(0.3, 1.0), min_size=1, max_size=3),
    st.integers(0, 3),
    st.floats(0, 100),
)
editors = st.lists(sessions, min_size=1, max_size=6).map(
    lambda found: [replace(held, name=f"s{n}") for n, held in enumerate(found)]
)


def _falling(share: float, saved: list[float]) -> list[float]:
    found = [share]
    for part in saved:
        found.append(found[-1] * part)
    return found


def run(held: list[Held], seconds: int, calm: Calm | None = None) -> list[list[Held]]:
    """The same sessions, decided about once a second."""
    calm, states = calm or Calm(), [held]
    for now in range(seconds):
        decision = decide(held, calm, float(now))
        calm = decision.calm
        held = [replace(session, rung=decision.rungs[session.name]) for session in held]
        states.append(held)
    return states


@given(editors)
@settings(max_examples=40, deadline=None)
def test_under_constant_load_nothing_swings(held: list[Held]) -> None:
    """Nobody who went down goes up, or the other way round, and an end is reached."""
    states = run(held, 200)
    for number, session in enumerate(held):
        rungs_seen = [state[number].rung for state in states]
        changes = [b - a for a, b in pairwise(rungs_seen) if a != b]
        downs = [n for n, change in enumerate(changes) if change > 0]
        assert all(n == 0 for n in downs) or all(change > 0 for change in changes), session
    assert states[-1] == states[-50]


@given(editors, st.data())
@settings(max_examples=40, deadline=None)
def test_nor_does_it_while_costs_are_noisy(held: list[Held], data: st.DataObject) -> None:
    """By 4 % either way, which is what the mean of ten chunks has left."""
    calm, last = Calm(), [session.rung for session in held]
    turns = [0] * len(held)
    for now in range(60):
        noise = data.draw(st.floats(0.96, 1.04))
        noisy = [replace(s, shares=tuple(share * noise for share in s.shares)) for s in held]
        decision = decide(noisy, calm, float(now))
        calm = decision.calm
        held = [replace(session, rung=decision.rungs[session.name]) for session in held]
        for n, session in enumerate(held):
            turns[n] += session.rung < last[n]
            last[n] = session.rung
        if now == 5:
            turns = [0] * len(held)
    assert sum(turns) <= sum(len(session.shares) for session in held)


@given(editors)
@settings(max_examples=40, deadline=None)
def test_no_live_session_is_lowered_while_a_lossless_one_can_wait(held: list[Held]) -> None:
    decision = decide(held, Calm(), 0.0)
    lowered = [s for s in held if s.live and decision.rungs[s.name] > s.rung]
    left = [replace(s, rung=decision.rungs[s.name]) for s in held if not s.live]
    assert not lowered or all(session.lower is None for session in left)


@given(editors)
@settings(max_examples=40, deadline=None)
def test_all_go_up_again_when_there_is_room(held: list[Held]) -> None:
    """Whoever was lowered is edited as asked once the others are gone."""
    _, *_, lowered = run(held, 20)
    one = lowered[0]
    if one.shares[0] > HEADROOM:
        one = replace(
            one, shares=tuple(0.99 * share * HEADROOM / one.shares[0] for share in one.shares)
        )
    assert run([one], 60, Calm(since=-1.0))[-1][0].rung == 0 or one.shares[0] <= one.share


@given(editors)
@settings(max_examples=40, deadline=None)
def test_what_is_left_is_no_more_than_may_be_promised(held: list[Held]) -> None:
    before, most = load_of(held), LOW if len(held) > 1 else HEADROOM
    decision = decide(held, Calm(), 0.0)
    after = [replace(session, rung=decision.rungs[session.name]) for session in held]
    if before > HIGH:
        assert load_of(after) <= HEADROOM or all(session.lower is None for session in after)
    else:
        assert load_of(after) <= max(before, most)


def test_the_border_of_admission_lowers_nobody() -> None:
    assert LOW < HEADROOM < HIGH < 1.0
    assert decide([live("a", HEADROOM, 0.1)], Calm(), 0.0).rungs == {"a": 0}
    assert ladder.decide([], Calm(), 0.0).rungs == {}
    assert FULL == "full"
