"""Clients, editors and machines, and the events of their day.

Whatever stays as it is costs nothing: an editor is looked at when somebody comes or goes, when its
ladder may have something to decide, and with all others every few seconds, as a report.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

from pipelines.bench.simulation.arrivals import NAME, Client, arrivals
from pipelines.bench.simulation.day import VARIANTS, Day, Roll, Rules
from pipelines.bench.simulation.late import LateShare
from pipelines.bench.simulation.simulated_editor import Device
from pipelines.bench.simulation.tally import Tally
from serve.admission import decisions
from serve.admission.admission import Editor
from serve.admission.decisions import Scale
from serve.hub.placement import ASKS_S, EDITOR_GONE_S, Full, Placed, Placement, Retired
from serve.versions.catalog import Catalog
from serve.versions.rolling import Version
from serve.wire.protocol import WireError

PATIENCE_S = 60.0  # for which a client waits that does
REPORT_S = 1.0  # until an editor says what has changed
ALIVE_S = 8.0  # how often it says that nothing has
WARM_S = 3600.0  # before the day, which counts for nothing
FOLLOW_S = 5.0  # how often the autoscaler looks
ORDERS_S = 1.0  # how often editors ask what to load while a version is rolled out
MOMENT_S = 0.001
MOVE_S = 2.0  # until a session of a lost editor asks for another
MACHINE_EDITORS = 8  # editors that are lost with one machine


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
        self.catalog = Catalog(pace=variant.pace)
        self.placement = Placement(
            self.scale, lambda: self.now, variant.rank, self.catalog, together=variant.together
        )
        self._models = [f"v{n}" if day.rolls else "" for n in range(len(day.rolls) + 1)]
        if day.rolls:
            self.catalog.serve({NAME: self._version(0)})
        self._rolled_at: float | None = None  # since when a version is rolled out
        self._random = random.Random(day.seed)
        self._degrade = variant.degrade and bool(day.rungs)
        self._late = LateShare(day)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._devices: dict[str, Device] = {}
        self._numbers = itertools.count()  # of devices
        self._starting = self._sessions = 0

    def run(self) -> None:
        end = WARM_S + self.day.hours * 3600
        for _ in range(self.scale.min_editors):
            self._start(0.0)
        self._coming = arrivals(self.day, WARM_S, random.Random(self.day.seed))
        self._next()
        for _ in range(self.day.lost_machines):
            self._at(self._random.uniform(WARM_S, end), self._lose_machine)
        for number, roll in enumerate(self.day.rolls, 1):
            self._at(WARM_S + roll.at_s, lambda n=number: self._roll(n))  # type: ignore[misc]
        self._at(0.0, self._follow)
        self._at(0.0, self._alive)
        self._at(WARM_S, self._count)
        while self._events and self._events[0][0] < end:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self.now = end
        for device in self._devices.values():
            device.count(self.tally)
            self.tally.editor_s += end - device.since

    def _count(self) -> None:
        """From here on: what was before was the start from nothing."""
        for device in self._devices.values():
            device.count(self.tally)
            device.since = self.now
        self.tally = Tally(most_editors=len(self._devices), most_sessions=self._sessions)

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    # --- clients

    def _next(self) -> None:
        client = next(self._coming, None)
        if client is not None:
            self._at(client.asked, lambda: self._arrive(client))

    def _arrive(self, client: Client) -> None:
        self._next()
        self.tally.asked += 1
        self._ask(client)

    def _ask(self, client: Client) -> None:
        if self.day.rolls and not client.model:
            menu = self.placement.catalog.menu(self.placement.editors)
            client.model = menu.choose(None, client.session)[1].key
        answer = self.placement.ask(client.request(self.day))
        if isinstance(answer, Placed) and self._open(client, answer.editor):
            return
        if isinstance(answer, Full):
            self.tally.refused += 1
        elif isinstance(answer, Retired):
            client.model = answer.model
            self._ask(client)
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
        try:
            device.open(client)
        except WireError:
            return False
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
        self._changed(device)
        return True

    def _end(self, client: Client, epoch: int) -> None:
        if client.epoch == epoch and client.editor:
            self.placement.released(client.stream)
            self._close(client)

    def _close(self, client: Client) -> None:
        device = self._devices[client.editor]
        device.close(client)
        self._sessions -= 1
        self._changed(device)

    # --- editors

    def _follow(self) -> None:
        """Serve's autoscaler, and editors that are too many."""
        point = SimpleNamespace(timestamp=self.now, value=self.placement.wanted())
        running = len(self._devices) + self._starting
        context = SimpleNamespace(
            raw_metrics={"wanted": {"hub": [point]}},
            current_num_replicas=running,
            target_num_replicas=running,
        )
        target, _ = decisions.follow(context)
        for _ in range(target - running):
            self._start(self.day.start_s * self._random.uniform(0.8, 1.5))
        for device in [d for d in self._devices.values() if not d.clients]:
            if self.placement.may_go(device.name):
                self._gone(device)
        self._at(self.now + FOLLOW_S, self._follow)

    def _start(self, seconds: float) -> None:
        self._starting += 1
        self._at(self.now + seconds, self._ready)

    def _ready(self) -> None:
        self._starting -= 1
        number = next(self._numbers)
        device = Device(
            f"e{number}", number % _machines(self.scale), self.day, self._late, lambda: self.now,
            degrade=self._degrade,
        )  # fmt: skip
        offers = self.catalog.offers(self.placement.editors)
        for model in [offer.stable for offer in offers] or [""]:
            device.learn(model)
        self._devices[device.name] = device
        self.tally.most_editors = max(self.tally.most_editors, len(self._devices))
        self._report(device)

    def _changed(self, device: Device) -> None:
        device.count(self.tally)
        if not device.report_due:
            device.report_due = True
            self._at(self.now + REPORT_S, lambda: self._report(device))

    def _report(self, device: Device) -> None:
        device.report_due = False
        if device.name not in self._devices:
            return
        close, again = device.decide()
        if close is not None:
            self.tally.closed += 1
            self._end(device.clients[close], device.clients[close].epoch)
        device.count(self.tally)
        self._say(device, device.known())
        if again < float("inf") and not device.report_due:
            device.report_due = True
            self._at(max(again, self.now + REPORT_S), lambda: self._report(device))

    def _alive(self) -> None:
        for device in self._devices.values():
            if device.said is not None:
                self._say(device, device.said)
        self._at(self.now + ALIVE_S, self._alive)

    def _say(self, device: Device, known: Editor) -> None:
        device.said_at = self.now
        self.placement.report(known)

    def _gone(self, device: Device) -> None:
        device.count(self.tally)
        del self._devices[device.name]
        self.tally.editor_s += self.now - device.since

    def _lose_machine(self) -> None:
        if self._devices:
            machine = self._random.choice(list(self._devices.values())).machine
            for device in [d for d in self._devices.values() if d.machine == machine]:
                self._lose(device)

    def _lose(self, device: Device) -> None:
        """It goes; its sessions ask for others."""
        for client in list(device.clients.values()):
            self.tally.moved += 1
            assert client.opened is not None
            client.length_s = max(1.0, client.length_s - (self.now - client.opened))
            self._close(client)
            client.epoch, client.again, client.opened = client.epoch + 1, True, self.now
            self._at(self.now + MOVE_S, lambda client=client: self._ask(client))  # type: ignore[misc]
        self._gone(device)

    # --- versions

    def _version(self, number: int) -> Version:
        return Version(self._models[number], self.day.sizes.work, lineage=NAME)

    def _roll(self, number: int) -> None:
        rolling = self._rolled_at is not None
        self.catalog.point(NAME, self._version(number), 1.0, None)
        self._rolled_at = self.now
        if not rolling:
            self._orders()

    def _orders(self) -> None:
        """Editors ask what to load and to drop, until all have what is served and nothing else."""
        for device in list(self._devices.values()):
            load, drop = self.placement.orders(device.name)
            for model in drop:
                device.capacity.forget(model)
            if load:
                device.loading = load
                seconds = self.day.load_s * self._random.uniform(0.8, 1.5)
                self._at(self.now + seconds, lambda d=device: self._loaded(d))  # type: ignore[misc]
            if load or drop:
                self._changed(device)
        offer = self.catalog.offers(self.placement.editors)[0]
        if not offer.target:
            assert self._rolled_at is not None
            if offer.stable != self._models[0]:
                self.tally.rolled_s = self.tally.rolled_s or self.now - self._rolled_at
            holding = {key for d in self._devices.values() for key in d.capacity.models}
            if holding <= {offer.stable}:
                self._rolled_at = None
                return
        self._at(self.now + ORDERS_S, self._orders)

    def _loaded(self, device: Device) -> None:
        if device.name not in self._devices:
            return
        model = device.loading
        if self._kills(model):
            self.tally.killed += 1
            self._lose(device)
            why = f"editor {device.name} died of it"
            # The hub knows it a moment before placement takes the editor for gone.
            known_at = max(self.now, device.said_at + EDITOR_GONE_S - MOMENT_S)
            self._at(known_at, lambda: self.catalog.fail(model, why))
        else:
            device.learn(model)
            self._changed(device)

    def _kills(self, model: str) -> bool:
        rolls: dict[str, Roll] = dict(zip(self._models[1:], self.day.rolls, strict=True))
        return model in rolls and rolls[model].kills


def _machines(scale: Scale) -> int:
    return max(1, scale.max_editors // MACHINE_EDITORS)
