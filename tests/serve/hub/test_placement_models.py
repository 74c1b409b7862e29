"""What `Placement` does where editors hold models: who goes where, what is loaded, and for whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.admission.admission import Editor, Request, Seat, Sizes, Warm
from serve.admission.decisions import Scale
from serve.hub.placement import (
    ASKS_S,
    DECIDE_S,
    Full,
    Placed,
    Placement,
    Retired,
    Waiting,
)
from serve.versions.catalog import Catalog
from serve.versions.rolling import Version
from tests.serve.clock import Clock

SIZES = Sizes((64, 96), (64, 96))
A, B, NEW = (Version(key, (64, 96), 10, "vae") for key in ("a 1", "b 1", "a 2"))


def editor(name: str, *versions: Version, streams: dict[str, Seat] | None = None) -> Editor:
    models = {version.key: Warm(12) for version in versions}
    return Editor(name, 12, 2, streams or {}, {SIZES: 0.1}, models=models)


def request(
    stream: str, version: Version, name: str = "a", *, waits: bool = False, again: bool = False
) -> Request:
    sizes = replace(SIZES, model=version.key)
    return Request(stream, f"s-{stream}", sizes, 16.0, waits=waits, again=again, name=name)


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


def placed(
    clock: Clock, *editors: Editor, budget: int = 0, most: int = 2, settle_s: float = 0.0
) -> Placement:
    catalog = Catalog(budget=budget, move=True)
    catalog.serve({"a": A, "b": B})
    made = Placement(Scale(len(editors), most), clock, catalog=catalog, settle_s=settle_s)
    for each in editors:
        made.report(each)
    return made


def test_a_session_goes_to_an_editor_that_holds_its_model(clock: Clock) -> None:
    busy = {"x": Seat("x", 0.5, model=B.key)}
    made = placed(clock, editor("empty", A), editor("busy", A, B, streams=busy), most=3)
    assert made.ask(request("1", B, "b")) == Placed("busy")
    assert made.ask(request("2", A)) == Placed("empty")
    # No room where its model is; the other editor could load it, and more editors would not help.
    assert made.ask(request("3", B, "b")) == Full()
    clock.now += DECIDE_S
    assert made.wanted() == 2
    assert made.orders("empty") == (B.key, frozenset())
    assert made.orders("empty") == ("", frozenset())  # said once
    made.report(editor("empty", A, B))
    assert made.ask(request("3", B, "b")) == Placed("empty")


def test_who_asks_for_a_model_that_nobody_holds_waits_and_gets_it(clock: Clock) -> None:
    """Also one whose client does not wait: the front gives up by itself."""
    made = placed(clock, editor("e", A), budget=10)
    assert made.orders("e") == ("", frozenset())  # both do not fit
    clock.now += DECIDE_S
    assert isinstance(made.ask(request("1", B, "b")), Waiting)
    assert made.orders("e") == ("", frozenset())  # who asks once may not come again
    clock.now += ASKS_S
    assert isinstance(made.ask(request("1", B, "b")), Waiting)
    assert made.orders("e") == (B.key, {A.key})
    assert isinstance(made.ask(request("2", A)), Waiting)  # no longer there
    made.report(editor("e", B))
    assert made.ask(request("1", B, "b")) == Placed("e")
    # Now it is used, and the other one waits until it is not.
    clock.now += ASKS_S
    made.ask(request("2", A))
    assert made.orders("e") == ("", frozenset())
    made.released("1")
    clock.now += ASKS_S
    made.ask(request("2", A))
    assert made.orders("e") == (A.key, {B.key})


def test_a_replaced_version_moves_its_sessions(clock: Clock) -> None:
    streams = {"x": Seat("s-x", 0.1, model=A.key)}
    made = placed(clock, editor("e", A, B, streams=streams))
    made.catalog.point("a", NEW, 1.0, None)
    clock.now += DECIDE_S
    assert made.orders("e") == (NEW.key, frozenset())
    assert made.ask(request("1", A)) == Placed("e")  # nothing has changed yet
    made.report(editor("e", A, B, NEW, streams=streams))
    clock.now += DECIDE_S
    assert made.orders("e") == ("", {A.key})
    assert [offer.stable for offer in made.offers()] == [NEW.key, B.key]
    assert made.ask(request("x", A, again=True)) == Retired(NEW.key)
    assert made.ask(request("2", A)) == Retired(NEW.key)
    assert made.ask(request("x", NEW, again=True)) == Placed("e")
    assert made.waiting == 0


def test_two_editors_do_not_load_a_new_version_at_once(clock: Clock) -> None:
    """Each hears its orders with a report of its own."""
    made = placed(clock, editor("e", A, B), editor("f", A, B))
    made.catalog.point("a", NEW, 1.0, None)
    clock.now += DECIDE_S
    assert made.orders("e") == (NEW.key, frozenset())
    assert made.ask(request("1", A)) == Placed("e")  # so that f is the emptier one from here on
    clock.now += DECIDE_S
    assert made.orders("f") == ("", frozenset())
    made.report(editor("e", A, B, NEW))
    clock.now += DECIDE_S
    assert made.orders("f") == (NEW.key, frozenset())


def test_who_lets_go_of_a_version_goes_on_loading_another(clock: Clock) -> None:
    """Until it says that it has it: no other editor begins meanwhile."""
    made = placed(clock, editor("e", A, B), editor("f", A))
    made.catalog.point("a", NEW, 1.0, None)
    made.report(replace(editor("e", A, B), loading=NEW.key))
    made.catalog.serve({"a": A})
    clock.now += DECIDE_S
    assert made.orders("e") == ("", {B.key})
    assert {known.name: known.loading for known in made.editors} == {"e": NEW.key, "f": ""}
    clock.now += DECIDE_S
    assert [made.orders(name) for name in "ef"] == [("", frozenset())] * 2


def test_a_hub_started_again_decides_on_versions_when_all_editors_have_spoken(
    clock: Clock,
) -> None:
    """In the middle of a roll: the first to report has the new version, the other one not yet."""
    new = editor("e", B, NEW)
    old = editor("f", A, B, streams={"x": Seat("s-x", 0.1, model=A.key)})
    made = placed(clock, new, settle_s=2.0)
    made.catalog.point("a", NEW, 1.0, None)
    for _ in range(3):
        clock.now += 0.6
        assert made.orders("e") == ("", frozenset())  # not that, which only f has
        assert [offer.stable for offer in made.offers()] == [A.key, B.key]
        assert made.menu() is None  # fronts keep theirs: in this one all would get the new
        assert isinstance(made.ask(request("x", A, again=True)), Waiting)
    made.report(old)
    assert made.ask(request("x", A, again=True)) == Placed("f")  # where its version is after all
    made.released("x")
    clock.now += DECIDE_S
    assert made.orders("f") == (NEW.key, frozenset())
    menu = made.menu()
    assert menu is not None
    assert menu.offers[0].share == 0.5
    clock.now += DECIDE_S
    made.report(editor("f", A, B, NEW, streams=old.streams))
    clock.now += DECIDE_S
    assert made.orders("f") == ("", {A.key})
    assert made.ask(request("x", A, again=True)) == Retired(NEW.key)


def test_a_hub_started_again_gives_no_version_up_that_an_editor_may_have(clock: Clock) -> None:
    """Of a session whose version is offered no more, and whose editor has not spoken yet."""
    made = placed(clock, editor("e", B, NEW), settle_s=2.0)
    made.catalog.serve({"a": NEW, "b": B})
    clock.now += 1.9
    assert isinstance(made.ask(request("x", A, again=True)), Waiting)
    clock.now += 0.1
    assert made.ask(request("x", A, again=True)) == Retired(NEW.key)


def test_what_was_used_last_stays(clock: Clock) -> None:
    """Of two that nobody uses any more, where somebody waits for a third."""
    made = placed(clock, editor("e", A, B), budget=20)
    third = Version("c 1", (64, 96), 10, "vae")
    made.catalog.serve({"a": A, "b": B, "c": third})
    for stream, version, name in (("1", B, "b"), ("2", A, "a")):
        assert made.ask(request(stream, version, name)) == Placed("e")
        made.released(stream)
        clock.now += 1.0
    for _ in range(2):
        assert isinstance(made.ask(request("3", third, "c")), Waiting)
        clock.now += DECIDE_S
    assert made.orders("e") == (third.key, {B.key})


def test_a_refused_open_brings_its_model_as_one_that_waits_does(clock: Clock) -> None:
    """To an editor that has to let go of another for it."""
    busy = {str(n): Seat(str(n), 0.1, model=B.key) for n in range(2)}
    made = placed(clock, editor("idle", A), editor("full", B, streams=busy), budget=10)
    clock.now += DECIDE_S
    assert made.orders("idle") == ("", frozenset())
    assert made.ask(request("1", B, "b")) == Full()
    clock.now += DECIDE_S
    assert made.orders("idle") == (B.key, {A.key})


def test_who_is_sent_to_another_version_waits_no_more(clock: Clock) -> None:
    busy = {str(n): Seat(str(n), 0.1, model=A.key) for n in range(2)}
    made = placed(clock, editor("e", A, streams=busy))
    assert isinstance(made.ask(request("1", A, waits=True)), Waiting)
    assert made.waiting == 1
    made.catalog.point("a", NEW, 1.0, None)
    made.report(editor("e", NEW, streams=busy))
    clock.now += DECIDE_S
    assert made.wanted() > 0
    assert made.ask(request("1", A, waits=True)) == Retired(NEW.key)
    assert made.waiting == 0
