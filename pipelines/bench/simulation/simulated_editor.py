"""An editor and its accelerator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from pipelines.bench.simulation.arrivals import Client
from pipelines.bench.simulation.day import Day
from pipelines.bench.simulation.late import LateShare
from pipelines.bench.simulation.tally import Tally
from serve.admission.admission import Editor, Warm
from serve.admission.ladder import OVER_S
from serve.admission.rungs import FULL, Means, Rung, slowed
from serve.editor.capacity import Capacity


class Device:
    """Decides as a served one does, with a served one's `Capacity`; what its chunks cost is
    learned as soon as they run."""

    def __init__(
        self, name: str, machine: int, day: Day, late: LateShare, clock: Callable[[], float],
        *, degrade: bool,
    ) -> None:  # fmt: skip
        self.name, self.machine, self.day = name, machine, day
        self._late, self._clock = late, clock
        self.means: Means | None = day.means if degrade else None
        self.capacity = Capacity(
            chunk_frames=day.chunk_frames,
            max_sessions=day.max_sessions,
            means=self.means,
            clock=clock,
        )
        self.since = self._counted = clock()
        self.clients: dict[str, Client] = {}
        self.loading = ""  # a version
        self.said: Editor | None = None
        self.said_at = self.since
        self.report_due = False
        self._rates = (0, 0.0, 0, 0)  # sessions, of them late, lowered, slowed

    def learn(self, model: str) -> None:
        """It has the version now, and has warmed it up."""
        day, capacity = self.day, self.capacity
        self.loading = ""
        costs = dict(capacity.costs)
        for rung, part in (day.rungs or {Rung(FULL, day.sizes.work): 1.0}).items():
            costs[replace(day.sizes.at(rung), model=model)] = part * day.cost_s
        capacity.costs, capacity.warm = costs, costs.copy()
        capacity.models[model] = Warm(day.chunk_frames, self.means)

    def open(self, client: Client) -> None:
        """Raises WireError where it has no room by its own measure."""
        self.capacity.admit(client.opening(self.day))
        self.clients[client.stream] = client
        client.editor = self.name

    def close(self, client: Client) -> None:
        self.capacity.release(client.stream)
        del self.clients[client.stream]
        client.editor = ""

    def decide(self) -> tuple[str | None, float]:
        """The stream that cannot be kept, and when there may be more to decide if nobody comes
        or goes."""
        capacity, now = self.capacity, self._clock()
        for client in self.clients.values():
            capacity.loads[client.stream].cost = self._cost(client)
        decision = capacity.decide()
        calm, again = decision.calm, math.inf
        if any(decision.rungs.values()) and now < calm.since + calm.up_s:
            again = calm.since + calm.up_s
        if calm.over is not None:
            again = min(again, calm.over + OVER_S)
        return decision.close, again

    def known(self) -> Editor:
        self.said = self.capacity.known(self.name, self.loading)
        return self.said

    def count(self, tally: Tally) -> None:
        """Adds what was since the last call; from now on it is as it is now."""
        now = self._clock()
        seconds, (sessions, late, lowered, slow) = now - self._counted, self._rates
        tally.session_s += seconds * sessions
        tally.late_s += seconds * late
        tally.lowered_s += seconds * lowered
        tally.slowed_s += seconds * slow
        names = [self.capacity.rung(stream).name for stream in self.clients]
        sessions, full, slow = len(names), names.count(FULL), names.count("slowed")
        late = sessions * self._late(self._load(), sessions)
        self._counted, self._rates = now, (sessions, late, sessions - full - slow, slow)

    def _cost(self, client: Client) -> float:
        """Seconds that a chunk of it really takes, as it is edited now."""
        return client.cost_s * self.day.rungs.get(self.capacity.rung(client.stream), 1.0)

    def _load(self) -> float:
        """Of the accelerator, by all that cannot wait for others."""
        load = 0.0
        for client in self.clients.values():
            cost = self._cost(client)
            share = cost * self.day.fps / self.day.chunk_frames
            waits = self.capacity.rung(client.stream).name == "slowed"
            load += slowed(share, cost) if waits else share
        return load
