"""What tenants use of the whole application: sessions at once, opens a minute, minutes a day.

Fronts report what they hold and have used (`Usage`), all of it each time: so the ledger of a new
hub knows the same after a beat, and what a dead front has used stays counted.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from serve.hub.records import HOLDER_BEAT_S
from serve.tenants import Tenant
from serve.wire.protocol import RETRY_AFTER_S, WireError

DAY_S = 24 * 3600
MINUTE_S = 60.0
GONE_S = 3 * HOLDER_BEAT_S  # a session that no front has reported for so long is over

Key = tuple[str, int]  # a session and its holder's epoch: a newer holder is there before the old


@dataclass(frozen=True)
class Used:
    """What one front holds, and what it has used of `day` (days since 1970, UTC)."""

    front: str
    day: int
    sessions: dict[Key, str]  # the tenant of each
    seconds: dict[str, float]  # of sessions, by tenant


class Usage:
    """A front's own count."""

    def __init__(self, front: str, clock: Callable[[], float] = time.time) -> None:
        self.front = front
        self._clock = clock
        self._held: dict[Key, str] = {}
        self._charged: set[Key] = set()
        self._seconds: dict[str, float] = defaultdict(float)
        self._counted = clock()

    def begin(self, key: Key, tenant: str) -> None:
        """A session asks for an editor: it counts as one, and its time does not yet."""
        self._held[key] = tenant

    def charge(self, key: Key) -> None:
        """It has an editor."""
        self._count()
        self._charged.add(key)

    def end(self, key: Key) -> None:
        self._count()
        self._charged.discard(key)
        self._held.pop(key, None)

    def used(self) -> Used:
        self._count()
        day = int(self._counted // DAY_S)
        return Used(self.front, day, dict(self._held), dict(self._seconds))

    def _count(self) -> None:
        now = self._clock()
        midnight = now // DAY_S * DAY_S
        if self._counted < midnight:
            self._seconds.clear()
            self._counted = midnight
        for key in self._charged:
            self._seconds[self._held[key]] += now - self._counted
        self._counted = now


@dataclass
class _Front:
    day: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Ledger:
    """Plain; on Ray it lives in the hub, so its methods are async like the store's."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._sessions: dict[Key, tuple[str, float]] = {}  # tenant, and when it was last reported
        self._opens: dict[str, deque[float]] = defaultdict(deque)
        self._fronts: dict[str, _Front] = defaultdict(_Front)

    async def enter(self, key: Key, tenant: Tenant) -> None:
        """Counts a session in, epoch 0 as a new one. Raises WireError `at_capacity` that names the
        limit, and when it may be tried again."""
        now = self._clock()
        self._sweep(now)
        opens = self._opens[tenant.name]
        while opens and opens[0] <= now - MINUTE_S:
            opens.popleft()
        others = {s for (s, _), (name, _) in self._sessions.items() if name == tenant.name}
        others.discard(key[0])
        most, rate = tenant.max_sessions, tenant.opens_per_minute
        if most is not None and len(others) >= most:
            raise _refused(f"{len(others)} sessions are open and {most} may be", RETRY_AFTER_S)
        if self._spent(tenant, now):
            left = DAY_S - now % DAY_S
            raise _refused(f"the {tenant.minutes_per_day:g} minutes of today are used", left)
        if rate is not None and key[1] == 0 and len(opens) >= rate:
            left = opens[0] + MINUTE_S - now
            raise _refused(f"{rate} sessions a minute may be opened", left)
        if key[1] == 0:
            opens.append(now)
        self._sessions[key] = (tenant.name, now)

    async def leave(self, key: Key) -> None:
        self._sessions.pop(key, None)

    async def beat(self, used: Used, tenants: dict[str, Tenant]) -> set[str]:
        """A front's report; returns which of its `tenants` have used up their minutes."""
        now = self._clock()
        self._fronts[used.front] = _Front(used.day, used.seconds)
        for key, tenant in used.sessions.items():
            self._sessions[key] = (tenant, now)
        return {name for name, tenant in tenants.items() if self._spent(tenant, now)}

    def _spent(self, tenant: Tenant, now: float) -> bool:
        if tenant.minutes_per_day is None:
            return False
        today = int(now // DAY_S)
        fronts = [front for front in self._fronts.values() if front.day == today]
        seconds = sum(front.seconds.get(tenant.name, 0.0) for front in fronts)
        return seconds >= tenant.minutes_per_day * MINUTE_S

    def _sweep(self, now: float) -> None:
        self._sessions = {k: s for k, s in self._sessions.items() if now - s[1] <= GONE_S}
        today = int(now // DAY_S)
        for name in [name for name, front in self._fronts.items() if front.day < today]:
            del self._fronts[name]


def _refused(what: str, retry_after_s: float) -> WireError:
    return WireError("at_capacity", f"your limit is reached: {what}", round(retry_after_s, 1))
