"""Clients, editors and machines, and the events of their day."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from modeling.detail.work_size import in_words
from pipelines.bench.simulation.day import VARIANTS, Day, Rules, busy
from pipelines.bench.simulation.late import LateShare
from pipelines.bench.simulation.tally import Tally
from serve.admission import decisions
from serve.admission.admission import Request, Warm
from serve.admission.decisions import Scale
from serve.admission.rungs import FULL, Rung, slowed
from serve.editor.capacity import Capacity
from serve.hub.placement import ASKS_S, Full, Placed, Placement
from serve.wire.protocol import WireError
from serve.wire.work import Opening

SESSION_S = 600.0  # median of a session's length; lengths are log-normal
SESSION_SPREAD = 1.0  # of their logarithm
COST_SPREAD = 0.2  # of the logarithm of what a session's chunks cost: scenes differ
WAITS = 0.5  # share of clients that wait in the queue
PATIENCE_S = 60.0  # for which they do
REPORT_S = 4.0  # a served editor reports every second; this is a quarter of the work
WARM_S = 3600.0  # before the day, which counts for nothing
FOLLOW_S = 5.0  # how often the autoscaler looks
MOVE_S = 2.0  # until a session of a lost editor asks for another
MACHINE_EDITORS = 8  # editors that are lost with one machine


@dataclass
class Client:
    number: int
    length_s: float
    cost_s: float  # what its chunks really cost
    waits: bool
    asked: float
    live: bool = True
    opened: float | None = None
    epoch: int = 0
    again: bool = False
    device: Device | None = None

    @property
    def stream(self) -> str:
        return f"{self.number}.{self.epoch}"


@dataclass
class Device:
    """An editor and its accelerator."""

    name: str
    machine: int
    capacity: Capacity
    since: float
    clients: dict[str, Client] = field(default_factory=dict)

    def cost(self, client: Client, day: Day) -> float:
        """Seconds that a chunk of it really takes, as it is edited now."""
        return client.cost_s * day.rungs.get(self.capacity.rung(client.stream), 1.0)

    def load(self, day: Day) -> float:
        """Of the accelerator, by all that cannot wait for others."""
        load = 0.0
        for client in self.clients.values():
            cost = self.cost(client, day)
            share = cost * day.fps / day.chunk_frames
            waits = self.capacity.rung(client.stream).name == "slowed"
            load += slowed(share, cost) if waits else share
        return load


def simulate(day: Day, variant: Rules = VARIANTS["ships"]) -> dict[str, float]:
    """The figures of one day under one way to decide."""
    world = World(day, variant)
    world.run()
    return world.tally.to_dict()


class World:
    def __init__(self, day: Day, variant: Rules) -> None:
        self.day, self.tally, self.now = day, Tally(), 0.0
        spare = round(variant.spare * day.scale.max_editors)
        delay = day.scale.delay_s if variant.delay_s is None else variant.delay_s
        self.scale = replace(day.scale, spare_editors=spare, delay_s=delay)
        self.placement = Placement(self.scale, lambda: self.now, variant.rank)
        self._random = random.Random(day.seed)
        self._degrade = variant.degrade and bool(day.rungs)
        self._late = LateShare(day)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count()
        self._devices: dict[str, Device] = {}
        self._starting = 0
        self._sessions = 0

    def run(self) -> None:
        end = WARM_S + self.day.hours * 3600
        for _ in range(self.scale.min_editors):
            self._start(0.0)
        for client in self._arrivals(end):
            self._at(client.asked, lambda client=client: self._arrive(client))  # type: ignore[misc]
        for _ in range(self.day.lost_machines):
            self._at(self._random.uniform(WARM_S, end), self._lose)
        self._at(0.0, self._follow)
        self._at(WARM_S, self._count)
        while self._events and self._events[0][0] < end:
            self.now, _, act = heapq.heappop(self._events)
            act()
        for device in self._devices.values():
            self.tally.editor_s += end - device.since

    def _count(self) -> None:
        """From here on: what was before was the start from nothing."""
        self.tally = Tally(most_editors=len(self._devices), most_sessions=self._sessions)
        for device in self._devices.values():
            device.since = self.now

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    # --- clients

    def _arrivals(self, end: float) -> Iterator[Client]:
        """A Poisson process that follows the day, thinned from the rate of the busiest hour."""
        length = SESSION_S * math.exp(SESSION_SPREAD**2 / 2)  # mean
        now, draw = 0.0, self._random
        while (now := now + draw.expovariate(self.day.sessions / length)) < end:
            if draw.random() < busy(now - WARM_S):
                yield Client(
                    next(self._numbers),
                    draw.lognormvariate(math.log(SESSION_S), SESSION_SPREAD),
                    self.day.cost_s * draw.lognormvariate(-(COST_SPREAD**2) / 2, COST_SPREAD),
                    draw.random() < WAITS,
                    now,
                    draw.random() >= self.day.lossless,
                )

    def _arrive(self, client: Client) -> None:
        self.tally.asked += 1
        self._ask(client)

    def _ask(self, client: Client) -> None:
        day, session = self.day, f"s{client.number}"
        answer = self.placement.ask(
            Request(
                client.stream,
                session,
                day.sizes,
                day.fps,
                client.epoch,
                client.waits,
                client.again,
                client.live,
            )
        )
        if isinstance(answer, Placed) and self._open(client, answer.editor):
            return
        if isinstance(answer, Full):
            self.tally.refused += 1
        elif self.now - client.asked < PATIENCE_S or client.again:
            self._at(self.now + ASKS_S, lambda: self._ask(client))
        else:
            self.tally.left += 1
            self.placement.released(client.stream)

    def _open(self, client: Client, name: str) -> bool:
        """Whether the editor that was named is there and has room, too."""
        device = self._devices.get(name)
        if device is None:
            return False
        (height, width), work = self.day.sizes.frame, in_words(self.day.sizes.work)
        opening = Opening(
            f"s{client.number}",
            "",
            width,
            height,
            self.day.fps,
            "live" if client.live else "lossless",
            stream=client.stream,
            work_size=work,
        )
        try:
            device.capacity.admit(opening)
        except WireError:
            return False
        device.clients[client.stream] = client
        client.device = device
        if client.opened is None:
            self.tally.opened += 1
            self.tally.waited.append(self.now - client.asked)
        else:
            self.tally.gaps.append(self.now - client.opened)
        client.opened = self.now
        epoch = client.epoch
        self._at(self.now + client.length_s, lambda: self._end(client, epoch))
        self._sessions += 1
        self.tally.most_sessions = max(self.tally.most_sessions, self._sessions)
        return True

    def _end(self, client: Client, epoch: int) -> None:
        if client.epoch != epoch or client.device is None:
            return
        self.placement.released(client.stream)
        self._close(client)

    def _close(self, client: Client) -> None:
        assert client.device is not None
        client.device.capacity.release(client.stream)
        del client.device.clients[client.stream]
        client.device = None
        self._sessions -= 1

    # --- editors

    def _follow(self) -> None:
        """Serve's autoscaler."""
        point = SimpleNamespace(timestamp=self.now, value=self.placement.wanted())
        running = len(self._devices) + self._starting
        context = SimpleNamespace(
            raw_metrics={"wanted": {"hub": [point]}},
            current_num_replicas=running,
            target_num_replicas=running,
        )
        target, _ = decisions.follow(context)
        for _ in range(min(target, self.scale.max_editors) - running):
            self._start(self.day.start_s * self._random.uniform(0.8, 1.5))
        self._at(self.now + FOLLOW_S, self._follow)

    def _start(self, seconds: float) -> None:
        self._starting += 1
        self._at(self.now + seconds, self._ready)

    def _ready(self) -> None:
        self._starting -= 1
        number = next(self._numbers)
        day = self.day
        means = day.means if self._degrade else None
        capacity = Capacity(
            chunk_frames=day.chunk_frames,
            max_sessions=day.max_sessions,
            means=means,
            clock=lambda: self.now,
        )
        capacity.models[day.sizes.model] = Warm(day.chunk_frames, means)
        for rung, part in (day.rungs or {Rung(FULL, day.sizes.work): 1.0}).items():
            sizes = day.sizes.at(rung)
            capacity.costs[sizes] = capacity.warm[sizes] = part * day.cost_s
        device = Device(f"e{number}", number % _machines(self.scale), capacity, self.now)
        self._devices[device.name] = device
        self.tally.most_editors = max(self.tally.most_editors, len(self._devices))
        self._report(device)

    def _report(self, device: Device) -> None:
        if self._devices.get(device.name) is not device:
            return
        capacity, tally = device.capacity, self.tally
        for client in device.clients.values():  # what its chunks cost is learned as they run
            capacity.loads[client.stream].cost = device.cost(client, self.day)
        close = capacity.decide().close
        if close is not None:
            tally.closed += 1
            self._end(device.clients[close], device.clients[close].epoch)
        for name in device.clients:
            on = capacity.rung(name).name
            tally.slowed_s += REPORT_S * (on == "slowed")
            tally.lowered_s += REPORT_S * (on not in (FULL, "slowed"))
        load = device.load(self.day)
        tally.session_s += REPORT_S * len(device.clients)
        tally.late_s += REPORT_S * self._late(load, len(device.clients)) * len(device.clients)
        self.placement.report(device.capacity.known(device.name))
        if self.placement.may_go(device.name):
            self._gone(device)
        else:
            self._at(self.now + REPORT_S, lambda: self._report(device))

    def _gone(self, device: Device) -> None:
        del self._devices[device.name]
        self.tally.editor_s += self.now - device.since

    def _lose(self) -> None:
        """A machine goes with its editors; their sessions ask for others."""
        if not self._devices:
            return
        machine = self._random.choice(list(self._devices.values())).machine
        for device in [d for d in self._devices.values() if d.machine == machine]:
            self._gone(device)
            for client in list(device.clients.values()):
                self.tally.moved += 1
                assert client.opened is not None
                client.length_s = max(1.0, client.length_s - (self.now - client.opened))
                self._close(client)
                client.epoch, client.again, client.opened = client.epoch + 1, True, self.now
                self._at(self.now + MOVE_S, lambda client=client: self._ask(client))  # type: ignore[misc]


def _machines(scale: Scale) -> int:
    return max(1, scale.max_editors // MACHINE_EDITORS)
