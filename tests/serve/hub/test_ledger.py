"""Tenants' limits, over all fronts: who is refused, for how long, and what deaths change."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from serve.hub.ledger import DAY_S, GONE_S, Ledger, Usage, Used
from serve.tenants import Tenant
from serve.wire.protocol import RETRY_AFTER_S, WireError

pytestmark = pytest.mark.anyio

NOON = 20_000 * DAY_S + DAY_S / 2
A, B = Tenant("a", max_sessions=2), Tenant("b", max_sessions=2)


@dataclass
class Office:
    """A ledger and its fronts under one clock."""

    now: float = NOON
    fronts: dict[str, Usage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger(lambda: self.now)

    def front(self, name: str) -> Usage:
        return self.fronts.setdefault(name, Usage(name, lambda: self.now))

    async def beat(self, *tenants: Tenant) -> set[str]:
        known = {tenant.name: tenant for tenant in tenants}
        spent = [await self.ledger.beat(front.used(), known) for front in self.fronts.values()]
        return set().union(*spent)

    async def refusal(self, session: str, tenant: Tenant, epoch: int = 0) -> WireError:
        with pytest.raises(WireError) as error:
            await self.ledger.enter((session, epoch), tenant)
        assert error.value.code == "at_capacity"
        return error.value


async def test_sessions_at_once_are_counted_by_tenant() -> None:
    office = Office()
    await office.ledger.enter(("1", 0), A)
    await office.ledger.enter(("2", 0), A)
    await office.ledger.enter(("3", 0), B)
    refused = await office.refusal("4", A)
    assert refused.message == "your limit is reached: 2 sessions are open and 2 may be"
    assert refused.retry_after_s == RETRY_AFTER_S
    await office.ledger.leave(("1", 0))
    await office.ledger.enter(("4", 0), A)


async def test_a_session_that_comes_back_counts_once_and_its_ghost_frees_nothing() -> None:
    office = Office()
    await office.ledger.enter(("1", 0), A)
    await office.ledger.enter(("2", 0), A)
    await office.ledger.enter(("2", 1), A)  # on another socket, while the first looks alive
    await office.ledger.leave(("2", 0))
    await office.refusal("3", A)
    await office.ledger.leave(("2", 1))
    await office.ledger.enter(("3", 0), A)
    await office.refusal("2", A, epoch=2)  # it was away, and its place is taken


async def test_a_front_that_died_holds_nothing_for_long() -> None:
    office = Office()
    for session in ("1", "2"):
        await office.ledger.enter((session, 0), A)
    office.front("x").begin(("1", 0), "a")
    office.now += GONE_S
    await office.beat()
    await office.refusal("3", A)
    office.now += 1
    await office.ledger.enter(("3", 0), A)  # nobody has said for long that 2 is open
    await office.refusal("4", A)


async def test_a_new_ledger_knows_after_a_beat() -> None:
    office = Office()
    spent = Tenant("a", max_sessions=1, minutes_per_day=10)
    office.front("x").begin(("1", 0), "a")
    office.front("x").charge(("1", 0))
    office.now += 9 * 60
    office.ledger = Ledger(lambda: office.now)
    assert await office.beat(spent) == set()
    await office.refusal("2", spent)
    office.now += 60
    assert await office.beat(spent) == {"a"}


async def test_opens_a_minute_slide() -> None:
    office = Office()
    tenant = Tenant("a", opens_per_minute=2)
    await office.ledger.enter(("1", 0), tenant)
    office.now += 40
    await office.ledger.enter(("2", 0), tenant)
    office.now += 19
    refused = await office.refusal("3", tenant)
    assert "2 sessions a minute may be opened" in refused.message
    assert refused.retry_after_s == pytest.approx(1.0)
    await office.ledger.enter(("2", 1), tenant)  # to come back is no open
    await office.ledger.enter(("4", 0), Tenant("b", opens_per_minute=1))  # another's is another's
    office.now += 1
    await office.ledger.enter(("3", 0), tenant)
    await office.refusal("5", tenant)


async def test_minutes_are_of_all_fronts_and_of_one_day() -> None:
    office = Office()
    tenant = Tenant("a", minutes_per_day=10)
    x, y = office.front("x"), office.front("y")
    for front, session in ((x, "1"), (y, "2")):
        front.begin((session, 0), "a")
        office.now += 100  # it waits for an editor, which costs nothing
        front.charge((session, 0))
    office.now += 200  # x has used 300 s, y 200
    assert await office.beat(tenant) == set()
    office.now += 49
    assert await office.beat(tenant) == set()
    y.end(("2", 0))
    office.now += 2
    assert await office.beat(tenant) == {"a"}
    refused = await office.refusal("3", tenant)
    assert refused.message == "your limit is reached: the 10 minutes of today are used"
    assert refused.retry_after_s == pytest.approx(DAY_S / 2 - 451, abs=0.1)
    del office.fronts["x"]  # it died; what it has used stays used
    await office.refusal("3", tenant)
    office.now += DAY_S / 2 - 451
    assert await office.beat(tenant) == set()
    # Nor does the share of the dead front count, which reports no other day.
    assert await office.beat(Tenant("a", minutes_per_day=1)) == set()
    await office.ledger.enter(("3", 0), tenant)


def test_a_session_over_midnight_is_charged_to_both_days() -> None:
    office = Office(now=NOON + DAY_S / 2 - 60)
    usage = office.front("x")
    usage.begin(("1", 0), "a")
    usage.charge(("1", 0))
    office.now += 45
    assert usage.used() == Used("x", 20_000, {("1", 0): "a"}, {"a": 45.0})
    office.now += 45
    assert usage.used() == Used("x", 20_001, {("1", 0): "a"}, {"a": 30.0})
    usage.end(("1", 0))
    office.now += 45
    assert usage.used() == Used("x", 20_001, {}, {"a": 30.0})


def test_what_was_used_since_the_last_report_is_charged_at_the_end() -> None:
    office = Office()
    usage = office.front("x")
    usage.begin(("1", 0), "a")
    usage.charge(("1", 0))
    office.now += 20
    assert usage.used().seconds == {"a": 20.0}
    office.now += 9
    usage.end(("1", 0))
    office.now += 9
    assert usage.used() == Used("x", 20_000, {}, {"a": 29.0})


def test_a_session_that_never_got_an_editor_can_end() -> None:
    office = Office()
    usage = office.front("x")
    usage.begin(("1", 0), "a")
    office.now += 45
    usage.end(("1", 0))
    usage.end(("1", 0))
    assert usage.used() == Used("x", 20_000, {}, {})
