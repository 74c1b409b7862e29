"""Rolling: which version a session gets, what an editor loads and lets go of, by tables and at
random."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serve.admission.admission import Editor, Request, Seat, Sizes, Warm
from serve.versions import rolling
from serve.versions.catalog import Catalog, Menu
from serve.versions.rolling import Offer, Plan, Shelves, Version
from serve.wire.protocol import WireError

SIZES = Sizes((64, 96), (64, 96))
WARM = Warm(12)
V = {key: Version(key, (64, 96), 10, "vae") for key in ("v1", "v2", "v3", "other")}
ROLLING = Offer("m", "v1", "v2")


def editor(name: str, *models: str, busy: str = "", loading: str = "", load: float = 0.1) -> Editor:
    """With a session of `busy`, if that is a model."""
    streams = {f"{name}-s": Seat(f"{name}-session", load, model=busy)} if busy else {}
    return Editor(name, 12, 8, streams, models=dict.fromkeys(models, WARM), loading=loading)


def plan(editors: list[Editor], *offers: Offer, **options: object) -> Plan:
    return rolling.plan(editors, offers, Shelves(V, **options))  # type: ignore[arg-type]


# --- sessions


def test_a_share_is_kept_by_session_and_only_grows() -> None:
    sessions = [f"{n:x}" for n in range(4000)]
    before: set[str] = set()
    for share in (0.0, 0.1, 0.5, 1.0):
        offer = replace(ROLLING, share=share)
        new = {s for s in sessions if offer.choose(s) == "v2"}
        assert new == {s for s in sessions if offer.choose(s) == "v2"}
        assert before <= new
        assert len(new) == pytest.approx(share * len(sessions), abs=0.03 * len(sessions))
        before = new
    assert {Offer("m", "v1").choose(s) for s in sessions} == {"v1"}


@pytest.mark.parametrize(
    ("meant", "holding", "share"),
    [
        (1.0, [["v1"], ["v1"]], 0.0),  # nobody has it: nobody gets it
        (1.0, [["v1", "v2"], ["v1"]], 0.5),
        (1.0, [["v1", "v2"], ["v1"], ["v1"], ["other"]], 1 / 3),  # of those that have the model
        (0.1, [["v1", "v2"], ["v1"]], 0.1),
        (0.1, [["v1", "v2"], ["v1", "v2"]], 0.1),
        (1.0, [["v2"], ["v1", "v2"]], 1.0),
        (1.0, [], 0.0),
    ],
)
def test_a_target_gets_what_it_is_meant_to_as_far_as_editors_have_it(
    meant: float, holding: list[list[str]], share: float
) -> None:
    editors = [editor(str(n), *models) for n, models in enumerate(holding)]
    assert rolling.present(replace(ROLLING, share=meant), editors).share == pytest.approx(share)


@pytest.mark.parametrize(
    ("share", "holding", "stable"),
    [
        (1.0, [["v1", "v2"], ["v1"]], "v1"),
        (1.0, [["v1", "v2"], ["v2"]], "v2"),
        (1.0, [["v2"], ["other"]], "v2"),
        (1.0, [["other"]], "v1"),  # on no editor: not tried yet
        (0.5, [["v1", "v2"]], "v1"),  # a canary never takes over by itself
    ],
)
def test_a_target_that_is_everywhere_is_stable(
    share: float, holding: list[list[str]], stable: str
) -> None:
    editors = [editor(str(n), *models) for n, models in enumerate(holding)]
    assert rolling.settled(replace(ROLLING, share=share), editors).stable == stable


@pytest.mark.parametrize(
    ("before", "alias", "after"),
    [
        (Offer("m", "v1"), ("v1", 1.0, ""), Offer("m", "v1")),
        (Offer("m", "v1"), ("v2", 1.0, ""), Offer("m", "v1", "v2")),
        (Offer("m", "v1"), ("v2", 0.1, "v3"), Offer("m", "v1", "v2", 0.1)),
        (Offer("m", "v1", "v2", 0.1), ("v2", 1.0, ""), Offer("m", "v1", "v2")),  # all of it now
        (Offer("m", "v1", "v2"), ("v1", 1.0, ""), Offer("m", "v1")),  # back by the same move
        (Offer("m", "v2"), ("v1", 1.0, ""), Offer("m", "v2", "v1")),  # also when it was done
        (Offer("m", "v1", "v2"), ("v3", 1.0, ""), Offer("m", "v1", "v3")),  # over a rolling one
        # A server that starts in a canary: the version before is the one that most get.
        (Offer("m", "v2"), ("v2", 0.1, "v1"), Offer("m", "v1", "v2", 0.1)),
        (Offer("m", "v2"), ("v2", 0.1, ""), Offer("m", "v2", "", 0.1)),
    ],
)
def test_an_alias_moves_an_offer(
    before: Offer, alias: tuple[str, float, str], after: Offer
) -> None:
    assert rolling.pointed(before, *alias) == after


@pytest.mark.parametrize(
    ("lineage", "running", "other"),
    [("vae", True, "v2"), ("vae", False, "v2"), ("another", True, ""), ("another", False, "v2")],
)
def test_a_running_session_goes_on_with_its_own_lineage_only(
    lineage: str, running: bool, other: str
) -> None:
    versions = {**V, "v1": replace(V["v1"], lineage=lineage)}
    offer = Offer("m", "v2")
    assert rolling.instead("v1", offer, versions, session="s", running=running) == other


def test_versions_without_a_lineage_share_none() -> None:
    versions = {key: replace(version, lineage="") for key, version in V.items()}
    assert rolling.instead("v1", Offer("m", "v2"), versions, session="s", running=True) == ""


# --- editors


def test_a_new_version_meets_one_editor_first_then_as_many_as_have_it() -> None:
    editors = [editor(str(n), "v1", load=n / 10, busy="v1") for n in range(5)]
    assert plan(editors, ROLLING) == Plan({"0": "v2"})  # the emptiest
    editors[0] = replace(editors[0], loading="v2")
    assert plan(editors, ROLLING) == Plan()
    editors[0] = editor("0", "v1", "v2")
    assert plan(editors, ROLLING) == Plan({"1": "v2"})
    editors[1] = editor("1", "v1", "v2")
    assert plan(editors, ROLLING).load.keys() == {"2", "3"}


def test_what_failed_at_an_editor_is_not_tried_there_again() -> None:
    editors = [editor("a", "v1"), editor("b", "v1")]
    assert plan(editors, ROLLING, refused={("a", "v2")}) == Plan({"b": "v2"})
    assert plan(editors, ROLLING, refused={("a", "v2"), ("b", "v2")}) == Plan()


@pytest.mark.parametrize(
    ("busy", "moving", "dropped"), [("", (), True), ("v1", (), False), ("v1", ("v1",), True)]
)
def test_an_old_version_leaves_with_its_last_session_or_moves_them(
    busy: str, moving: tuple[str, ...], dropped: bool
) -> None:
    editors = [editor("a", "v1", "v2", busy=busy)]
    drop = {"a": frozenset({"v1"})} if dropped else {}
    assert plan(editors, Offer("m", "v2"), moving=moving) == Plan({}, drop)


def test_an_editor_does_not_let_go_of_all_it_has() -> None:
    assert plan([editor("a", "v1", loading="v2")], Offer("m", "v2")) == Plan()


def test_within_a_budget_what_is_asked_for_comes_and_what_was_not_used_leaves() -> None:
    offers = (Offer("a", "v1"), Offer("b", "v2"), Offer("c", "v3"))
    here = editor("e", "v1", "v2")
    used = {("e", "v1"): 5.0, ("e", "v2"): 9.0}
    options = {"budget": 20, "used": used}
    assert plan([here], *offers, **options) == Plan()  # nobody waits for it
    wanted = Plan({"e": "v3"}, {"e": frozenset({"v1"})})
    assert plan([here], *offers, asked=["v3"], **options) == wanted
    assert plan([here], *offers, asked=["v3"], budget=30) == Plan({"e": "v3"})  # it fits
    busy = editor("e", "v1", "v2", busy="v1")
    wanted = Plan({"e": "v3"}, {"e": frozenset({"v2"})})
    assert plan([busy], *offers, asked=["v3"], **options) == wanted
    both = replace(busy, streams={**busy.streams, "t": Seat("t", 0.1, model="v2")})
    assert plan([both], *offers, asked=["v3"], **options) == Plan()


def test_a_target_that_is_tried_does_not_cost_the_only_copy_of_another() -> None:
    assert plan([editor("a", "v1")], ROLLING, budget=10) == Plan()
    two = [editor("a", "v1"), editor("b", "v1")]
    assert plan(two, ROLLING, budget=10) == Plan({"a": "v2"}, {"a": frozenset({"v1"})})


@pytest.mark.parametrize(
    ("budget", "having", "keys"),
    [
        (0, {}, ["v1", "v2", "v3"]),
        (20, {}, ["v1", "v2"]),
        (20, {"v1": 1, "v2": 1}, ["v3", "v1"]),  # what nobody has yet
        (5, {"v1": 1}, ["v2"]),  # one in any case
    ],
)
def test_an_editor_that_starts_takes_what_is_rare_and_fits(
    budget: int, having: dict[str, int], keys: list[str]
) -> None:
    assert rolling.first(["v1", "v2", "v3"], V, budget, having) == keys


# --- the catalog


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
    made.point("m", V["v2"], 1.0, None)  # as it was: not tried again
    assert made.menu(editors).offers[0] == Offer("m", "v1")
    made.point("m", V["v1"], 1.0, None)
    assert made.notes(editors) == []
    made.point("m", V["v2"], 1.0, None)
    assert made.plan(editors[1:], {}, ["v2"]) == Plan({"b": "v2"})  # another try, also there


def test_a_stable_version_that_one_editor_cannot_load_is_served_by_the_others() -> None:
    made, editors = catalog(), [editor("a", "v1", "other"), editor("b", "other")]
    made.fail("v1", "out of memory", "b")
    assert made.menu(editors).offers[0] == Offer("m", "v1")
    assert made.plan(editors, {}, []) == Plan()
    assert made.notes(editors) == ["editor b could not load v1"]


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


def test_who_waits_for_sessions_to_end_is_told_so() -> None:
    made = Catalog(budget=15)
    made.serve({"m": V["v1"]}, moving=["m"])
    made.point("m", V["v2"], 1.0, None)
    editors = [editor(name, "v1", busy="v1") for name in "abc"]
    waits = "m: v2 does not fit beside v1, and waits for the last session of that on {}"
    assert made.plan(editors, {}, []) == Plan()
    assert made.notes(editors)[1:] == [waits.format("3 editors")]
    editors[0] = editor("a", "v1")
    assert made.plan(editors, {}, []) == Plan({"a": "v2"}, {"a": frozenset({"v1"})})
    editors[:2] = [editor("a", "v2", busy="v2"), editor("b", "v1")]
    assert made.notes(editors)[1:] == [waits.format("1 editor")]
    assert made.plan(editors, {}, []) == Plan({"b": "v2"}, {"b": frozenset({"v1"})})
    editors[1:] = [editor("b", "v2"), editor("c", "v1")]
    assert made.plan(editors, {}, []) == Plan({"c": "v2"}, {"c": frozenset({"v1"})})
    assert made.menu([*editors[:2], editor("c", loading="v2")]).offers == (Offer("m", "v1", "v2"),)


def test_who_only_tries_a_version_or_shares_it_gives_none_up() -> None:
    """A canary has the editor that it needs, and what another name stands for stays."""
    editors = [editor("a", "v2"), editor("b", "v1"), editor("c", "v1")]
    canary = replace(ROLLING, share=0.5)
    assert plan(editors, canary, budget=15) == Plan()
    assert plan(editors, ROLLING, Offer("n", "v1"), budget=15) == Plan()
    assert plan(editors, ROLLING, budget=15) == Plan({"b": "v2"}, {"b": frozenset({"v1"})})
    # Back: the editor that has nothing else gives the new one up, when nobody uses it.
    back = Offer("m", "v1")
    assert plan(editors, back, budget=15) == Plan({"a": "v1"}, {"a": frozenset({"v2"})})
    editors[0] = editor("a", "v2", busy="v2")
    assert plan(editors, back, budget=15) == Plan()


def test_a_redeploy_with_other_names_keeps_what_is_rolling() -> None:
    made = catalog()
    made.point("m", V["v2"], 1.0, None)
    made.serve({"o": V["v3"], "m": V["v1"], "n": V["v3"]}, moving=["m"])
    assert made.menu([]).offers[2] == Offer("n", "v3")  # a folder's name, and another folder
    assert [offer.name for offer in made.menu([]).offers] == ["o", "m", "n"]
    assert made.menu([]).offers[1].target == "v2"


class Rolling(RuleBasedStateMachine):
    """Editors that load, die and fail, sessions that come and go, an alias that moves."""

    fit = 2  # versions in an editor

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog(budget=10 * self.fit, move=True)
        self.catalog.serve({"m": V["v1"]})
        self.editors = {str(n): editor(str(n), "v1") for n in range(3)}
        self.broken: set[str] = set()
        self.alias, self.count = "v1", 0

    def state(self) -> list[Editor]:
        return list(self.editors.values())

    @rule(alias=st.sampled_from(["v1", "v2", "v3"]), share=st.sampled_from([0.2, 1.0]))
    def point(self, alias: str, share: float) -> None:
        self.alias = alias
        self.catalog.point("m", V[alias], share, None)

    @initialize(broken=st.sets(st.sampled_from(["v2", "v3"])))
    def breaks(self, broken: set[str]) -> None:
        self.broken = broken

    @rule()
    def decide(self) -> None:
        self.catalog.settle(self.state())
        plan = self.catalog.plan(self.state(), {}, [])
        for key in {*plan.load.values()}:
            having = sum(e.holds(key) for e in self.state())
            coming = sum(e.loading == key for e in self.state())
            coming += list(plan.load.values()).count(key)
            assert coming <= max(1, having)
        for name, keys in plan.drop.items():
            here = self.editors[name]
            left = {k: WARM for k in here.models or {} if k not in keys}
            streams = {n: s for n, s in here.streams.items() if s.model not in keys}
            assert left or name in plan.load
            self.editors[name] = replace(here, models=left, streams=streams)
        for name, key in plan.load.items():
            self.editors[name] = replace(self.editors[name], loading=key)

    @rule(name=st.sampled_from("012"))
    def loaded(self, name: str) -> None:
        here = self.editors[name]
        if here.loading and here.loading in self.broken:
            self.catalog.fail(here.loading, "broken", name)
            self.editors[name] = replace(here, loading="")
        elif here.loading:
            models = {**(here.models or {}), here.loading: WARM}
            self.editors[name] = replace(here, models=models, loading="")

    @rule()
    def opens(self) -> None:
        self.count += 1
        session = f"s{self.count}"
        _, version = self.catalog.menu(self.state()).choose("m", session)
        assert version.key not in self.broken, "a broken version takes a session"
        holding = [e for e in self.state() if e.holds(version.key)]
        assert holding, f"{version.key} is offered, and nobody has it"
        here = holding[self.count % len(holding)]
        streams = {**here.streams, session: Seat(session, 0.1, model=version.key)}
        self.editors[here.name] = replace(here, streams=streams)

    @rule(name=st.sampled_from("012"))
    def ends(self, name: str) -> None:
        self.editors[name] = replace(self.editors[name], streams={})

    @invariant()
    def within_budget(self) -> None:
        for here in self.state():
            keys = {*(here.models or {}), *([here.loading] if here.loading else [])}
            assert len(keys) <= self.fit

    def teardown(self) -> None:
        """Left alone with the alias, every editor has its version, or keeps what it had."""
        self.catalog.point("m", V[self.alias], 1.0, None)
        for _ in range(20):
            self.decide()
            for name in "012":
                self.loaded(name)
                self.ends(name)
        (offer,) = self.catalog.menu(self.state()).offers
        if self.alias not in self.broken:
            assert offer == Offer("m", self.alias)
        assert all((e.models or {}).keys() == {offer.stable} for e in self.state())
        assert offer.stable not in self.broken


class OneByOne(Rolling):
    """Where two versions do not fit in an editor."""

    fit = 1


AT_RANDOM = settings(max_examples=20, stateful_step_count=30, deadline=None)
TestRolling, TestOneByOne = Rolling.TestCase, OneByOne.TestCase
TestRolling.settings = TestOneByOne.settings = AT_RANDOM


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.floats(0, 1), st.floats(0, 1)), st.integers())
def test_more_of_a_share_never_takes_a_session_back(
    shares: tuple[float, float], session: int
) -> None:
    less, more = (replace(ROLLING, share=s).choose(str(session)) for s in sorted(shares))
    assert (less, more) != ("v2", "v1")
