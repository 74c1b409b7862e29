"""Rolling: which version a session gets, what an editor loads and lets go of, by tables and at
random."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serve.admission.admission import Editor, Seat
from serve.versions import rolling
from serve.versions.catalog import Catalog
from serve.versions.rolling import Offer, Plan, Shelves
from tests.serve.versions.fleet import ROLLING, WARM, V, editor


def plan(editors: list[Editor], *offers: Offer, **options: object) -> Plan:
    return rolling.plan(editors, offers, Shelves(V, **options))  # type: ignore[arg-type]


def test_what_leaves_is_what_this_editor_did_not_use_for_longest() -> None:
    """Whatever others did with it."""
    sizes = {key: rolling.Version(key, (1, 1), 1) for key in "abc"}
    used = {("e", "a"): 5.0, ("e", "b"): 1.0, ("f", "a"): 0.0, ("f", "b"): 9.0}
    offers = [Offer(key, key) for key in "ab"]
    shelves = Shelves(sizes, budget=2, used=used, asked=["c"], refused=[("f", "c")])
    found = rolling.plan([editor("e", "a", "b"), editor("f", "a", "b")], offers, shelves)
    assert found == Plan({"e": "c"}, {"e": frozenset("b")})


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
        (Offer("m", "v2"), ("v2", 1.0, "v1"), Offer("m", "v2")),  # it has been over for long
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


@pytest.mark.parametrize(
    ("shares", "others"), [([0.1, 0.1], [0.3]), ([0.2], [0.1, 0.1]), ([], [0.0])]
)
def test_a_version_comes_first_where_least_is_done(
    shares: list[float], others: list[float]
) -> None:
    """By what sessions cost, then by how many they are; not by names."""
    seats = [{str(n): Seat(str(n), s) for n, s in enumerate(each)} for each in (others, shares)]
    editors = [
        replace(editor(name, "v1"), streams=each) for name, each in zip("az", seats, strict=True)
    ]
    assert plan(editors, ROLLING) == Plan({"z": "v2"})


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


def test_what_leaves_an_editor_makes_room_at_once_unless_a_session_uses_it() -> None:
    """Within a budget of two: v1 is offered no more, so v3 may come beside v2."""
    offers, shelves = (Offer("m", "v2"), Offer("n", "v3")), Shelves(V, budget=20)
    gone = {"a": frozenset({"v1"})}
    assert rolling.plan([editor("a", "v1", "v2")], offers, shelves) == Plan({"a": "v3"}, gone)
    assert rolling.plan([editor("a", "v1", "v2", busy="v1")], offers, shelves) == Plan()
    moves = replace(shelves, moving={"v1"})  # its memory is there until the last one has moved
    assert rolling.plan([editor("a", "v1", "v2", busy="v1")], offers, moves) == Plan({}, gone)


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
    assert plan([here], *offers, asked=["gone"], **options) == Plan()  # nobody knows it any more
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
    assert rolling.first(["v1", "v2", "v3", "v1"], V, budget, having) == keys


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
