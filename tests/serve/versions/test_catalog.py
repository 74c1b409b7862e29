"""The catalog: which version a name means, what has failed, what an operator is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.admission.admission import Request
from serve.versions.catalog import Catalog, Menu
from serve.versions.rolling import Offer, Plan, Version
from serve.wire.protocol import WireError
from tests.serve.versions.fleet import SIZES, V, editor


def catalog(*, move: bool = False) -> Catalog:
    made = Catalog(move=move)
    made.serve({"m": V["v1"], "n": V["other"]})
    return made


def request(model: str, *, again: bool = False) -> Request:
    return Request("s-1", "s", replace(SIZES, model=model), 16.0, again=again, name="m")


def test_a_model_that_nobody_serves_is_refused_with_those_there_are() -> None:
    menu = catalog().menu([editor("a", "v1", "other")])
    assert menu.choose(None, "s") == ("m", V["v1"])
    assert menu.choose("n", "s") == ("n", V["other"])
    with pytest.raises(WireError, match=r"no model 'x{60}' is served; choose m, n") as raised:
        menu.choose("x" * 100, "s")
    assert raised.value.code == "bad_request"
    assert isinstance(menu, Menu)


def test_a_target_that_failed_takes_nothing_until_the_alias_has_been_elsewhere() -> None:
    made, editors = catalog(), [editor("a", "v1", "v2"), editor("b", "v1")]
    made.point("m", V["v2"], 1.0, None)
    assert made.menu(editors).offers[0].share == 0.5
    made.fail("v2", "no such file /secret/vae", "b")
    assert made.menu(editors).offers[0] == Offer("m", "v1")
    assert made.plan(editors, {}, []).drop == {"a": frozenset({"v2"})}
    assert "v2" not in made.plan(editors, {}, []).load.values()
    assert made.notes(editors) == ["v2 takes no sessions: it could not be loaded"]
    assert made.instead(request("v2"), editors) == "v1"
    made.fail("v2", "told again", "a")  # the first reason is the one that is told of
    assert made.failed == {"v2": "no such file /secret/vae"}
    made.point("m", V["v2"], 1.0, None)  # as it was: not tried again
    assert made.menu(editors).offers[0] == Offer("m", "v1")
    made.point("m", V["v1"], 1.0, None)
    assert made.notes(editors) == []
    made.point("m", V["v2"], 1.0, None)
    assert made.plan(editors[1:], {}, ["v2"]) == Plan({"b": "v2"})  # another try, also there


def test_a_stable_version_that_one_editor_cannot_load_is_served_by_the_others() -> None:
    made, editors = catalog(), [editor("a", "v1", "other"), editor("b", "other")]
    made.fail("v1", "out of memory", "b")
    made.fail("/srv/secret/other", "out of memory", "a")  # strangers read of it: not where it lies
    assert made.menu(editors).offers[0] == Offer("m", "v1")
    assert made.plan(editors, {}, []) == Plan()
    assert made.notes(editors) == ["editor a could not load other", "editor b could not load v1"]


def test_a_version_is_loaded_at_the_pace_that_is_set() -> None:
    made = Catalog(pace=lambda having: 2 + having)
    made.serve({"m": V["v1"]}, moving=["m"])
    made.point("m", V["v2"], 1.0, None)
    editors = [editor(name, "v1", *(["v2"] if name == "a" else [])) for name in "abcde"]
    assert made.plan(editors[1:], {}, []).load == {"b": "v2", "c": "v2"}
    assert made.plan(editors, {}, []).load.keys() == {"b", "c", "d"}


@pytest.mark.parametrize(
    ("move", "again", "held", "other"),
    [
        (False, True, True, ""),  # it finishes on the version that it began with
        (True, True, True, "v2"),
        (False, True, False, "v2"),  # its editor is gone, and nobody else has that version
        (False, False, True, "v2"),  # one that only comes now, from a front that did not know
    ],
)
def test_sessions_of_a_replaced_version(move: bool, again: bool, held: bool, other: str) -> None:
    made, editors = catalog(move=move), [editor("a", "v1", "v2", "other")]
    made.point("m", V["v2"], 1.0, None)
    made.settle(editors)
    editors = [editor("a", *(["v1"] if held else []), "v2", "other")]
    assert made.menu(editors).offers[0] == Offer("m", "v2")
    assert made.instead(request("v1", again=again), editors) == other
    assert made.instead(request("v2", again=again), editors) == ""
    busy = [editor("a", "v1", "v2", "other", busy="v1")]
    assert made.plan(busy, {}, []).drop == ({"a": frozenset({"v1"})} if move else {})


def test_a_session_that_cannot_go_on_with_the_new_version_waits_for_its_own() -> None:
    made = catalog(move=True)
    made.point("m", replace(V["v2"], lineage="another"), 1.0, None)
    made.settle([editor("a", "v1", "v2", "other")])
    editors = [editor("a", "v2", "other")]
    assert made.instead(request("v1", again=True), editors) == ""
    assert made.plan(editors, {}, ["v1"]) == Plan({"a": "v1"})


def test_a_version_that_came_back_is_moved_from_no_more() -> None:
    """It was replaced once, by one that its sessions could go on with, and now by one that not."""
    made, editors = catalog(move=True), [editor("a", "v1", "v2", "other")]
    for key in ("v2", "v1"):
        made.point("m", V[key], 1.0, None)
        made.settle(editors)
        assert made.menu(editors).offers[0] == Offer("m", key)
    made.point("m", replace(V["v3"], lineage="another"), 1.0, None)
    made.settle([editor("a", "v1", "v3", "other")])
    busy = [editor("a", "v1", "v3", "other", busy="v1")]
    assert made.plan(busy, {}, []).drop == {}
    assert made.instead(request("v1", again=True), busy) == ""


def test_a_canary_is_told_and_does_not_end_by_itself() -> None:
    made, editors = catalog(), [editor("a", "v1", "v2"), editor("b", "v1", "v2")]
    made.point("m", V["v2"], 0.1, V["v1"])
    made.settle(editors)
    assert made.menu(editors).offers[0] == Offer("m", "v1", "v2", 0.1)
    (note,) = made.notes(editors)
    assert note == "m: v2 is on 2 of 2 editors and gets 10% of new sessions, v1 the rest"


@pytest.mark.parametrize(
    ("budget", "editors", "told"),
    [
        (3 * 10**9, 1, "raise editor_memory_gb from 3 to 4, or max_editors"),
        (4 * 10**9, 1, ""),
        (0, 1, ""),  # no bound
        (3 * 10**9, 2, ""),  # one gives it up while the other serves
    ],
)
def test_what_can_never_roll_is_said(budget: int, editors: int, told: str) -> None:
    made = Catalog(budget=budget)
    one, two = (Version(key, (32, 48), size=2 * 10**9) for key in ("w1", "w2"))
    made.serve({"m": one}, moving=["m"])
    made.point("m", two, 1.0, None)
    there = [editor(name, "w1") for name in "ab"[:editors]]
    notes = " ".join(made.notes(there))
    assert "m: w2 is on 0 of" in notes
    assert ("no editor has room for w2 beside what it alone holds" in notes) is bool(told)
    assert told in notes
    can = made.plan(there, {}, []).load != {}
    assert can is not bool(told)
    # While one takes it in all the same nobody has to do anything, nor while there is none at all.
    for those in ([editor("a", "w1", loading="w2")], []):
        assert "no editor has room" not in " ".join(made.notes(those))


def test_as_much_memory_is_advised_as_the_emptiest_editor_needs() -> None:
    made = Catalog(budget=3 * 10**9)
    one, two, other = (
        Version(key, (32, 48), size=size * 10**9) for key, size in (("w1", 2), ("w2", 2), ("x", 3))
    )
    made.serve({"m": one, "n": other}, moving=["m"])
    made.point("m", two, 1.0, None)
    (note,) = [n for n in made.notes([editor("a", "x"), editor("b", "w1")]) if "no editor" in n]
    assert note == (
        "m: no editor has room for w2 beside what it alone holds; raise editor_memory_gb from 3 to "
        "4, or max_editors"
    )


def test_who_waits_for_sessions_to_end_is_told_so() -> None:
    made = Catalog(budget=15)
    made.serve({"m": V["v1"]}, moving=["m"])
    made.point("m", V["v2"], 1.0, None)
    editors = [editor(name, "v1", busy="v1") for name in "abc"]
    waits = "m: v2 does not fit beside v1, and waits for the last session of that on {}"
    assert made.plan(editors, {}, []) == Plan()
    assert made.notes(editors)[1:] == [waits.format("3 editors")]
    for budget, told in ((19, [waits.format("3 editors")]), (20, []), (0, [])):  # both fit in 20
        made.budget = budget
        assert made.notes(editors)[1:] == told
    made.budget = 15
    coming = replace(editors[0], loading="v2")  # which waits for nothing
    assert made.notes([coming, *editors[1:]])[1:] == [waits.format("2 editors")]
    editors[0] = editor("a", "v1")
    assert made.plan(editors, {}, []) == Plan({"a": "v2"}, {"a": frozenset({"v1"})})
    editors[:2] = [editor("a", "v2", busy="v2"), editor("b", "v1")]
    assert made.notes(editors)[1:] == [waits.format("1 editor")]
    assert made.plan(editors, {}, []) == Plan({"b": "v2"}, {"b": frozenset({"v1"})})
    editors[1:] = [editor("b", "v2"), editor("c", "v1")]
    assert made.plan(editors, {}, []) == Plan({"c": "v2"}, {"c": frozenset({"v1"})})
    assert made.menu([*editors[:2], editor("c", loading="v2")]).offers == (Offer("m", "v1", "v2"),)


def test_a_redeploy_with_other_names_keeps_what_is_rolling() -> None:
    made = catalog()
    made.point("m", V["v2"], 1.0, None)
    made.serve({"o": V["v3"], "m": V["v1"], "n": V["v3"]}, moving=["m"])
    assert made.menu([]).offers[2] == Offer("n", "v3")  # a folder's name, and another folder
    assert [offer.name for offer in made.menu([]).offers] == ["o", "m", "n"]
    assert made.menu([]).offers[1].target == "v2"
