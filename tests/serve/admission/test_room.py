"""Who has room where, and what it would take: tables over modes, means and models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.admission import admission, decisions
from serve.admission import fleet as fleet_module
from serve.admission.admission import Editor, Request, Seat, Warm
from serve.admission.fleet import Fleet
from serve.admission.rungs import Means
from tests.serve.admission.made import SIZES, editor, request

COST = 0.3  # seconds a chunk of 12 frames: 0.4 of an editor at 16 frames a second
HALVED = replace(SIZES, halved=True)
LADDER = Means(steps=4)


def squeezable(*seats: Seat, means: Means | None = LADDER) -> Editor:
    """Whose live sessions can be edited in half the time."""
    streams = {seat.session: seat for seat in seats}
    return Editor("a", 12, 8, streams, {SIZES: COST, HALVED: COST / 2}, means=means)


@pytest.mark.parametrize(
    ("live", "means", "least"),
    [
        (True, LADDER, 0.2),
        (False, LADDER, COST / 5),  # a chunk in five seconds
        (True, None, 0.4),
        (False, None, 0.4),
        (True, Means(), 0.4),
        (False, Means(), COST / 5),
    ],
)
def test_the_least_that_a_stream_can_do_with(live: bool, means: Means | None, least: float) -> None:
    asked, where = replace(request("x"), live=live), squeezable(means=means)
    assert admission.shares_at(where, asked) == pytest.approx((0.4, least))
    seat = admission.with_stream(where, asked).streams["x"]
    assert (seat.session, seat.share, seat.least) == (
        "session-x",
        *map(pytest.approx, (0.4, least)),
    )


@pytest.mark.parametrize(
    ("seat", "live", "means", "as_asked", "squeezed"),
    [
        (Seat("s", 0.4, 0.2), True, LADDER, True, True),
        (Seat("s", 0.5, 0.5), True, LADDER, False, True),
        (Seat("s", 0.6, 0.6), True, LADDER, False, True),  # the border: 0.6 + 0.2
        (Seat("s", 0.61, 0.61), True, LADDER, False, False),
        (Seat("s", 0.9, 0.6), True, LADDER, False, True),  # who is there goes down, too
        (Seat("s", 0.9, None), True, LADDER, False, False),
        # Nobody is edited less well for a lossless one, and without means nobody is at all.
        (Seat("s", 0.4, 0.2), False, LADDER, True, True),
        (Seat("s", 0.5, 0.2), False, LADDER, False, False),
        (Seat("s", 0.5, 0.2), True, None, False, False),
    ],
)
def test_who_has_room_as_asked_and_who_below_that(
    seat: Seat, live: bool, means: Means | None, as_asked: bool, squeezed: bool
) -> None:
    where, asked = squeezable(seat, means=means), replace(request("x"), live=live)
    assert admission.fits(where, asked) is as_asked
    assert admission.has_room(where, asked) is squeezed
    # Its own ghost is in nobody's way.
    ghost = replace(where, streams={"old": replace(seat, session=asked.session)})
    assert admission.fits(ghost, asked)
    # Nor is there room for a model that is not there, in an editor however empty.
    elsewhere = replace(where, models={"other": Warm(12, means)}, streams={})
    assert not admission.fits(elsewhere, asked)
    assert not admission.has_room(elsewhere, asked)
    assert admission.fits(replace(elsewhere, models={"": Warm(12, means)}), asked)


def test_who_has_no_room_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand full editors, by a queue that asks twice a second each."""
    asked = list[str]()

    def fits(where: Editor, wanted: Request) -> bool:
        asked.append(where.name)
        return admission.fits(where, wanted)

    monkeypatch.setattr(fleet_module, "fits", fits)
    full = Fleet([editor(name, 0.7) for name in "abc"])
    for changed, then in ((None, "abc"), (None, ""), ("b", "b"), (None, "")):
        if changed:
            full.put(editor(changed, 0.75))
        asked.clear()
        assert full.place(request("x")) is None
        assert "".join(sorted(asked)) == then


@pytest.mark.parametrize("lossless", [True, False])
def test_the_last_resort_squeezes_nobody_for_a_lossless_one(lossless: bool) -> None:
    """Of an editor that is to become empty as of any other."""
    asked = replace(request("x"), live=not lossless)
    found = Fleet([squeezable(Seat("s", 0.5, 0.2))]).place(asked, frozenset({"a"}))
    assert (found is None) is lossless


def test_of_those_to_avoid_the_emptiest_with_room_as_asked_is_the_last_resort() -> None:
    """Before one that would edit its sessions less well, however much emptier."""
    first, cheap = squeezable(Seat("s", 0.5, 0.2)), {SIZES: COST / 3, HALVED: COST / 6}
    others = [
        replace(first, name=name, streams={"t": Seat("t", load)}, costs=cheap, priced={})
        for name, load in (("c", 0.62), ("b", 0.6))
    ]
    for editors, wanted in (([first, *others], "b"), ([replace(first, name="d"), first], "a")):
        found = Fleet(editors).place(request("x"), frozenset("abcd"))
        assert found is not None
        assert found.name == wanted


def test_a_ghost_that_went_makes_room_for_who_was_refused_before_it() -> None:
    """In one round: a's dear old stream is replaced by a cheap new one."""
    full = replace(editor("a", 0.7), streams={"old": Seat("session-back", 0.7)})
    left = Fleet([full]).place_all([request("x"), request("back", fps=4.0), request("y")])
    assert [asked.stream for asked in left] == ["x"]


def test_who_lost_its_editor_is_placed_first_where_editors_are_counted() -> None:
    """0.5 are free: for the 0.28 of who comes again, so both of 0.49 need an editor of their own.
    Placed as they came, one of 0.49 has the place, and the others one editor together."""
    waiting = [request("x", fps=28.0), request("y", fps=28.0), request("back", again=True)]
    assert decisions.needed(Fleet([editor("a", 0.3)]), waiting) == 3


def test_an_empty_editor_could_load_what_nobody_has_yet() -> None:
    sizes = replace(SIZES, model="here")
    full = Editor("a", 12, 8, {"s": Seat("s", 0.7, model="here")}, {sizes: 0.21},
                  models={"here": Warm(12)})  # fmt: skip
    asked = replace(request("x"), sizes=replace(SIZES, model="new"))
    assert decisions.needed(Fleet([full]), [asked]) == 2
    assert decisions.needed(Fleet([full, replace(full, name="b", streams={})]), [asked]) == 2


def test_a_count_takes_editors_that_hold_the_same_as_they_are() -> None:
    """A thousand of them: what shapes take at each is worked out once, not at every count."""
    first = {name: replace(editor(name), models={"m": Warm(12)}) for name in "ab"}
    fleet = Fleet(first.values())
    taught = decisions._taught(fleet, [replace(request("x"), sizes=replace(SIZES, model="m"))])
    assert [each is first[each.name] for each in taught.editors] == [True, True]


def test_what_a_count_teaches_editors_is_what_they_do_not_know() -> None:
    """Their own costs hold there; a model that nobody has is like what an editor takes for usual,
    not like another; and streams are tried at them in the same order."""
    other = replace(SIZES, model="m")
    known = [
        Editor(name, 24, 8, {}, {SIZES: cost, **more}, models={"m": Warm(12)})
        for name, cost, more in (("a", 0.1, {}), ("b", 0.2, {other: 0.3}))
    ]

    def fullest(editor: Editor) -> tuple[float]:
        return (-editor.load,)

    asked = [replace(request("x"), sizes=replace(SIZES, model="new"))]
    fleet = Fleet(known, fullest, together=False)
    taught = decisions._taught(fleet, asked)
    for made in (taught, fleet.trial()):
        assert (made.rank, made.together) == (fullest, False)
    assert [each.costs for each in taught.editors] == [
        {SIZES: 0.1, other: 0.3}, {SIZES: 0.2, other: 0.3}
    ]  # fmt: skip
    assert [each.models for each in taught.editors] == [{"m": Warm(12), "new": Warm(24)}] * 2


@pytest.mark.parametrize(
    ("place", "sessions", "starting_s", "seconds"),
    [
        (1, 10, None, 30.0),  # one of ten ends every thirty seconds
        (3, 10, None, 90.0),
        (3, 10, 40.0, 40.0),  # an editor is there before that,
        (1, 10, 40.0, 30.0),  # or after
        (2, 0, None, 600.0),
    ],
)
def test_how_long_it_takes_until_a_place_is_free(
    place: int, sessions: int, starting_s: float | None, seconds: float
) -> None:
    assert decisions.expected_s(place, sessions, 300.0, starting_s) == pytest.approx(seconds)


def test_a_session_that_comes_back_is_not_refused_for_its_own_ghost() -> None:
    """Also where there is room only with everybody edited less well."""
    ghost = squeezable(Seat("session-x", 0.4, 0.4), Seat("other", 0.6, 0.6))
    assert not admission.fits(ghost, request("x"))
    assert admission.has_room(ghost, request("x"))
    assert not admission.has_room(ghost, request("y"))


def test_a_stream_that_has_moved_stays_where_it_is_when_its_old_editor_lets_go_of_it() -> None:
    """Whichever of the two reports first."""
    moved = {"s": Seat("session", 0.3)}
    for first, then in (("a", "b"), ("b", "a")):
        fleet = Fleet([replace(editor("a"), streams=moved), editor("b")])
        now = {"a": editor("a"), "b": replace(editor("b"), streams=moved)}
        fleet.put(now[first])
        fleet.put(now[then])
        assert fleet.of("s") == now["b"]
        assert (fleet.streams, fleet.knows("session"), sum(fleet.grains.values())) == (1, True, 1)
        fleet.put(editor("b"))
        assert (fleet.of("s"), fleet.knows("session"), fleet.grains) == (None, False, {})
