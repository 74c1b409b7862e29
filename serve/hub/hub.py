"""The application's one shared actor: session records, and what every process reports.

It lives outside of every replica, so that a session outlives its front. It ends itself when nobody
has reported for a while, and Ray starts it again (empty) when it dies.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import get_node_ip_address

from infra.runtime.ray_private import serve_replicas
from serve.hub.ledger import Ledger
from serve.hub.records import COMMIT_KINDS, Commit, SessionStore
from serve.metrics import HubMetrics, Retired, Snapshot
from serve.scaling.decisions import Editor
from serve.scaling.placement import Placed, Placement, Places
from serve.settings import ServeSettings
from serve.wire.link import Address, Asker, Listener
from serve.wire.protocol import WireError

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
        self._listener = Listener(link_host(settings), COMMIT_KINDS)
        self._commits: Address | None = None
        self._placement = Placement(settings.scale)
        self.parts = {"store": self.store, "ledger": self.ledger, "places": self._placement}
        self._ending = False
        self._left: dict[str, int] = {}  # connections of each front that knows of the stop
        self._reports: dict[str, tuple[float, Report]] = {}
        self._stopping: set[str] = set()
        self._starting: dict[str, tuple[float, str]] = {}  # since when an editor does what
        self._heard = time.monotonic()
        self._watching = asyncio.ensure_future(self._watch())

    async def part(self, name: str, method: str, args: list[Any], named: dict[str, Any]) -> Any:
        """A call of one of `parts`."""
        answer = getattr(self.parts[name], method)(*args, **named)
        return await answer if inspect.isawaitable(answer) else answer

    async def commits(self) -> Address:
        """Where commits are taken."""
        self._commits = self._commits or await self._listener.answer(self.store.commit)
        return self._commits

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


class HubClient:
    """A process's way to the hub: its own methods by `call`, its parts as if they were here.

    While the hub is down sessions go on, but cannot be resumed.
    """

    store: SessionStore
    ledger: Ledger
    places: Places

    def __init__(self, app: str, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self.hub = hub_actor(app, settings)
        kept: dict[str, Any] = {"beat": [], "release": None}
        self.store = cast(SessionStore, _Records(self, "store", kept))
        # Nobody is held to a limit that all fronts share.
        free: dict[str, Any] = {"enter": None, "leave": None, "beat": frozenset()}
        self.ledger = cast(Ledger, _Part(self, "ledger", free))
        # Any editor will do: it decides itself whether it has room.
        anywhere = {"ask": Placed(""), "released": None}
        self.places = cast(Places, _Part(self, "places", anywhere, ASK_S))

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


class _Part:
    """Its methods are those of the hub's part called `name`. `down` is what they answer while the
    hub is, where they do."""

    def __init__(
        self, hub: HubClient, name: str, down: dict[str, Any], timeout_s: float | None = None
    ) -> None:
        self._hub, self._name, self._down, self._timeout_s = hub, name, down, timeout_s

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    async def _call(self, method: str, *args: Any, **named: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._hub.call("part", self._name, method, list(args), named)
        except RayTaskError as error:
            if isinstance(error.cause, WireError):
                raise error.cause from None
            raise
        except (RayActorError, TimeoutError) as error:
            if method not in self._down:
                raise
            log.warning("%s.%s without the hub: %s", self._name, method, error)
            return self._down[method]


class _Records(_Part):
    """Commits come over a link, because every chunk waits for its own: through Ray one costs 6 ms
    on a small machine, most of it for the state, and this way it costs one."""

    _asker: Asker | None = None

    async def commit(self, commit: Commit) -> bool:
        self._asker = self._asker or Asker(lambda: self._hub.call("commits"), COMMIT_KINDS)
        try:
            return bool(await self._asker.ask(commit))
        except (OSError, RayActorError) as error:
            log.warning("a session's progress could not be kept: %s", error)
            return True
