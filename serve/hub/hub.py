"""The application's one shared actor: session records, and what every process reports.

It lives outside of every replica, so that a session outlives its front. It ends itself when nobody
has reported for a while, and Ray starts it again (empty) when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util import get_node_ip_address

from infra.runtime.ray_private import serve_replicas
from serve.hub.commits import CommitAddress, CommitClient, CommitServer
from serve.hub.ledger import Key, Ledger, Used
from serve.hub.records import Entry, Header, Progress, Record, SessionStore, Shape
from serve.metrics import HubMetrics, Retired, Snapshot
from serve.scaling.decisions import Editor, Request
from serve.scaling.placement import Answer, Placed, Placement
from serve.settings import ServeSettings
from serve.tenants import Tenant

log = logging.getLogger(__name__)

NAMESPACE = "liveedit"
REPORT_S = 1.0  # how often a process reports
WATCH_S = 2.0  # how often Serve is asked which replicas have to stop
GONE_S = 10.0  # a process that has not reported for so long is gone
ASK_S = 3.0  # for the hub to say where a stream goes
ALONE_S = 300.0  # without any report the hub ends itself


@dataclass(frozen=True)
class Report:
    """What a replica says of itself every `REPORT_S`; a front has no model and no editor."""

    process: str  # the replica's id
    metrics: Snapshot
    model: dict[str, Any] | None = None
    editor: Editor | None = None
    connections: int = 0  # that a front has


@dataclass(frozen=True)
class Orders:
    """What the hub answers.

    `leave`: Serve wants this replica to stop, so it gives its sessions back. `go`: there is one
    editor too many and this one is empty. `wanted`: so many editors there should be. `stop`: the
    application ends, so a front finishes its sessions.
    """

    leave: bool
    go: bool = False
    wanted: int = 0
    stop: bool = False


class Hub:
    """See the module; an async actor, so that its methods run on one event loop."""

    def __init__(self, app: str, settings: ServeSettings) -> None:
        self.app = app
        self.store = SessionStore(settings.limits.resume_s)
        self.ledger = Ledger()
        self.metrics = HubMetrics()
        self._retired = Retired()
        self._commits = CommitServer(self.store, link_host(settings))
        self._placement = Placement(settings.scale)
        self._ending = False
        self._left: dict[str, int] = {}  # connections of each front that knows of the stop
        self._reports: dict[str, tuple[float, Report]] = {}
        self._stopping: set[str] = set()
        self._starting: dict[str, tuple[float, str]] = {}  # since when an editor does what
        self._heard = time.monotonic()
        self._watching = asyncio.ensure_future(self._watch())

    # --- sessions, see SessionStore

    async def create(self, header: Header) -> str:
        return self.store.create(header)

    async def claim(self, token: str, received: int, shape: Shape) -> Record:
        return self.store.claim(token, received, shape)

    async def commits(self) -> CommitAddress:
        return await self._commits.address()

    async def beat(self, held: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return self.store.beat(held)

    async def release(self, token: str, epoch: int, forget: bool) -> None:
        self.store.release(token, epoch, forget=forget)

    # --- tenants, see Ledger

    async def enter(self, key: Key, tenant: Tenant) -> None:
        self.ledger.enter(key, tenant)

    async def leave(self, key: Key) -> None:
        self.ledger.leave(key)

    async def use(self, used: Used, tenants: dict[str, Tenant]) -> set[str]:
        return self.ledger.beat(used, tenants)

    # --- processes

    async def report(self, report: Report) -> Orders:
        self._heard = time.monotonic()
        self._reports[report.process] = (self._heard, report)
        self._starting.pop(report.process, None)
        self._retired.back(report.process)
        leave = report.process in self._stopping
        if report.editor is None:
            if self._ending:
                self._left[report.process] = report.connections
            return Orders(leave, stop=self._ending)
        self._placement.report(report.editor)
        go = not leave and self._placement.may_go(report.process)
        return Orders(leave, go, self._placement.wanted())

    async def starting(self, process: str, doing: str) -> None:
        """An editor that cannot report yet says what it does."""
        self._heard = time.monotonic()
        self._starting[process] = (self._heard, doing)

    async def started(self) -> str:
        """What editors that are not ready do, and for how long; empty when there are none."""
        now = time.monotonic()
        return "; ".join(
            f"editor {process} is {doing}, for {now - since:.0f} s"
            for process, (since, doing) in self._starting.items()
        )

    # --- streams, see Placement

    async def ask(self, request: Request) -> Answer:
        return self._placement.ask(request)

    async def released(self, stream: str) -> None:
        self._placement.released(stream)

    async def stop(self) -> bool:
        """The application ends: fronts finish their sessions. Returns whether all of them have."""
        self._ending = True
        fronts = {report.process for report in self._alive() if report.editor is None}
        return all(self._left.get(front) == 0 for front in fronts)

    async def models(self) -> list[dict[str, Any]]:
        """The models that warmed-up editors hold, each once, with the number of its editors."""
        found: dict[str, dict[str, Any]] = {}
        for report in self._alive():
            if report.model is not None:
                model = found.setdefault(report.model["name"], {**report.model, "editors": 0})
                model["editors"] += 1
        return list(found.values())

    async def snapshots(self) -> dict[str, Snapshot]:
        """Of every process that lives, of the hub itself, and what the others had counted."""
        alive = self._alive()
        metrics, models = self.metrics, {r.model["name"] for r in alive if r.model is not None}
        metrics.bytes.set(self.store.bytes)
        metrics.records.set(len(self.store))
        metrics.wanted.set(self._placement.wanted())
        metrics.ready.set(sum(report.model is not None for report in alive))
        metrics.waiting.set(self._placement.waiting)
        metrics.build.clear()
        for model in models or {""}:
            metrics.build.labels(liveedit_version(), ray.__version__, model).set(1)
        return {
            **{report.process: report.metrics for report in alive},
            "hub": metrics.snapshot(),
            "gone": self._retired.snapshot(),
        }

    def _alive(self) -> list[Report]:
        limit = time.monotonic() - GONE_S
        for name in [name for name, (heard, _) in self._reports.items() if heard <= limit]:
            _, report = self._reports.pop(name)
            self._retired.add(name, report.metrics)
            if name not in self._stopping and not self._placement.asked_to_go(name):
                kind = "editor" if report.model is not None else "front"
                self.metrics.lost.labels(kind).inc()
                log.warning("%s %s is gone, and nobody had asked it to", kind, name)
        return [report for _, report in self._reports.values()]

    async def _watch(self) -> None:
        """Asks Serve which replicas have to stop: it tells a replica only when all is over."""
        while time.monotonic() - self._heard < ALONE_S:
            await asyncio.sleep(WATCH_S)
            try:
                found = await asyncio.to_thread(serve_replicas, self.app)
                self._stopping = {replica.name for replica in found if replica.stopping}
                self._placement.gone(frozenset(self._stopping))
                there = {replica.name for replica in found if not replica.stopping}
                self._starting = {n: s for n, s in self._starting.items() if n in there}
            except ray.exceptions.RayError as error:  # the controller may be starting or gone
                log.warning("no word from Serve: %s", error)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def liveedit_version() -> str:
    try:
        return version("liveedit")
    except PackageNotFoundError:  # a copied tree, as in an image
        return "unknown"


def link_host(settings: ServeSettings) -> str:
    """Where a process of the application listens for the others."""
    return settings.link_host or get_node_ip_address()


def hub_actor(app: str, settings: ServeSettings) -> Any:
    """The application's hub, started if it is not there."""
    return (
        ray.remote(Hub)
        .options(
            name=f"hub-{app}",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
        )
        .remote(app, settings)
    )


class HubStore:
    """`records.Store`, `ledger.Accounts` and `placement.Places` on the hub.

    While the hub is down sessions go on, but cannot be resumed.
    """

    def __init__(self, app: str, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self.hub = hub_actor(app, settings)
        self._commits = CommitClient(lambda: self.call("commits"))

    async def call(self, method: str, *args: Any) -> Any:
        """One call, again on a new hub if the old one is gone for good."""
        try:
            return await getattr(self.hub, method).remote(*args)
        except RayActorError:
            self.hub = hub_actor(self.app, self.settings)
            return await getattr(self.hub, method).remote(*args)

    def starting(self, process: str, doing: str) -> None:
        """See `Hub.starting`; nobody waits for it."""
        self.hub.starting.remote(process, doing)

    async def create(self, header: Header) -> str:
        token: str = await self.call("create", header)
        return token

    async def claim(self, token: str, received: int, shape: Shape) -> Record:
        try:
            record: Record = await self.call("claim", token, received, shape)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return record

    async def commit(
        self, token: str, epoch: int, header: Header, progress: Progress, entries: list[Entry]
    ) -> bool:
        try:
            return await self._commits.commit(token, epoch, header, progress, entries)
        except (OSError, RayActorError, ActorUnavailableError) as error:
            log.warning("a session's progress could not be kept: %s", error)
            return True

    async def beat(self, held: list[tuple[str, int]]) -> list[tuple[str, int]]:
        with contextlib.suppress(RayActorError, ActorUnavailableError):
            lost: list[tuple[str, int]] = await self.call("beat", held)
            return lost
        return []

    async def release(self, token: str, epoch: int, *, forget: bool = False) -> None:
        with contextlib.suppress(RayActorError, ActorUnavailableError):
            await self.call("release", token, epoch, forget)

    async def enter(self, key: Key, tenant: Tenant) -> None:
        """While the hub is down nobody is held to a limit that all fronts share."""
        try:
            await self.call("enter", key, tenant)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (RayActorError, ActorUnavailableError) as error:
            log.warning("tenant %s enters without the hub: %s", tenant.name, error)

    async def leave(self, key: Key) -> None:
        with contextlib.suppress(RayActorError, ActorUnavailableError):
            await self.call("leave", key)

    async def use(self, used: Used, tenants: dict[str, Tenant]) -> set[str]:
        with contextlib.suppress(RayActorError, ActorUnavailableError):
            spent: set[str] = await self.call("use", used, tenants)
            return spent
        return set()

    async def ask(self, request: Request) -> Answer:
        """While the hub is down any editor will do: it decides itself whether it has room."""
        try:
            async with asyncio.timeout(ASK_S):
                answer: Answer = await self.call("ask", request)
                return answer
        except (RayActorError, ActorUnavailableError, TimeoutError) as error:
            log.warning("a stream is placed without the hub: %s", error)
            return Placed("")

    async def released(self, stream: str) -> None:
        with contextlib.suppress(RayActorError, ActorUnavailableError):
            await self.call("released", stream)
