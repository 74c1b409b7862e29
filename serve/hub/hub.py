"""The application's one shared actor: session records, and what every process reports.

It lives outside of every replica, so that a session outlives its front. It ends itself when nobody
has reported for a while, and Ray starts it again (empty) when it dies.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.util import get_node_ip_address

from infra.runtime.ray_private import serve_replicas
from serve.admission.admission import Editor, Request
from serve.hub.commits import take
from serve.hub.ledger import Ledger
from serve.hub.placement import Full, Placed, Placement, Retired, Waiting
from serve.hub.records import COMMIT_KINDS, Record, SessionStore
from serve.limits import Limits
from serve.metrics import GoneProcesses, HubMetrics, Readings
from serve.settings import ServeSettings
from serve.versions.aliases import Aliases
from serve.versions.catalog import Catalog, Menu
from serve.versions.source import ModelSource, Named
from serve.wire.link import Address, Listener
from serve.wire.pack import dialect

log = logging.getLogger(__name__)

NAMESPACE = "liveedit"
REPORT_S = 1.0  # how often a process reports
WATCH_S = 2.0  # how often Serve is asked which replicas have to stop
GONE_S = 10.0  # a process that has not reported for so long is gone
SETTLE_S = 2 * REPORT_S  # from the first editor's report until all are taken for known
GATHER_S = 10.0  # for fronts to tell a new hub of the sessions that they have
ALONE_S = 300.0  # without any report the hub ends itself


@dataclass(frozen=True)
class Report:
    """What a replica says of itself every `REPORT_S`; a front has no models and no editor.

    `failed` says why an editor could not load a version. `serves` is what the application was built
    with, at `began` (`time.time()`), as far as a front knows.
    """

    process: str  # the replica's id
    metrics: Readings
    models: dict[str, dict[str, Any]] = field(default_factory=dict)  # by key
    editor: Editor | None = None
    connections: int = 0  # that a front has
    failed: dict[str, str] = field(default_factory=dict)
    serves: tuple[Named, ...] = ()
    began: float = 0.0
    settings: ServeSettings | None = None  # a front's


@dataclass(frozen=True)
class Orders:
    """What the hub answers.

    `leave`: Serve wants this replica to stop, so it gives its sessions back. `go`: there is one
    editor too many and this one is empty. `wanted`: so many editors there should be. `stop`: the
    application ends, so a front finishes its sessions. `load` and `drop`: models that an editor
    takes in and lets go of. `menu`: what a front's clients may choose, None for
    what it knows already.
    """

    leave: bool
    go: bool = False
    wanted: int = 0
    stop: bool = False
    load: ModelSource | None = None
    drop: frozenset[str] = frozenset()
    menu: Menu | None = None


class Hub:
    """See the module; an async actor, so that its methods run on one event loop."""

    def __init__(self, app: str, settings: ServeSettings, serves: tuple[Named, ...] = ()) -> None:
        self.app = app
        self.store = SessionStore(gather_s=GATHER_S)
        self.ledger = Ledger()
        self.metrics = HubMetrics()
        self._retired = GoneProcesses()
        self._listener = Listener(link_host(settings), COMMIT_KINDS)
        self._commits: Address | None = None
        self._catalog = Catalog()
        self._placement = Placement(settings.scale, catalog=self._catalog, settle_s=SETTLE_S)
        self._set(settings)
        self._follower = Aliases(self._catalog)
        self._follower.serve(serves)
        self._began = 0.0  # of the newest front
        self.parts = {"store": self.store, "ledger": self.ledger, "places": self._placement}
        self._ending = False
        self._left: dict[str, int] = {}  # connections of each front that knows of the stop
        self._reports: dict[str, tuple[float, Report]] = {}
        self._stopping: set[str] = set()
        self._starting: dict[str, tuple[float, str]] = {}  # since when an editor does what
        self._heard = time.monotonic()
        self._watching = asyncio.ensure_future(self._watch())
        self._following = asyncio.ensure_future(self._follower.run())

    def _set(self, settings: ServeSettings) -> None:
        """All that it needs of them but where it listens, which others know already."""
        self.store.resume_s = settings.limits.resume_s
        self.store.max_bytes = round(settings.hub_memory_gb * 1e9)
        self._catalog.budget = round(settings.editor_memory_gb * 1e9)
        self._catalog.move = settings.on_new_version == "move"
        self._placement.scale = settings.scale

    async def part(self, name: str, method: str, args: list[Any], named: dict[str, Any]) -> Any:
        """A call of one of `parts`."""
        answer = getattr(self.parts[name], method)(*args, **named)
        return await answer if inspect.isawaitable(answer) else answer

    async def commits(self) -> Address:
        """Where commits are taken."""
        self._commits = self._commits or await self._listener.answer(partial(take, self.store))
        return self._commits

    async def report(self, report: Report) -> Orders:
        self._heard = time.monotonic()
        self._reports.pop(report.process, None)  # so that who was not heard for longest is first
        self._reports[report.process] = (self._heard, report)
        self._starting.pop(report.process, None)
        self._retired.back(report.process)
        leave = report.process in self._stopping
        if report.editor is None:
            if self._ending:
                self._left[report.process] = report.connections
            if report.serves and report.began > self._began:
                self._began = report.began
                self._follower.serve(report.serves)
                if report.settings is not None:
                    self._set(report.settings)
            return Orders(leave, stop=self._ending, menu=self._placement.menu())
        self._sweep()  # what one died of must not be given to the next
        self._placement.report(report.editor)
        for key, why in report.failed.items():
            self._catalog.fail(key, why, report.process)
        go = not leave and self._placement.may_go(report.process)
        load, drop = ("", frozenset[str]()) if leave else self._placement.orders(report.process)
        source = self._follower.sources.get(load)
        if source is not None:  # should it die of it at once, before it reports again
            ordered = replace(report, editor=replace(report.editor, loading=load))
            self._reports[report.process] = (self._heard, ordered)
        return Orders(leave, go, self._placement.wanted(), load=source, drop=drop)

    async def first(self, serves: tuple[Named, ...]) -> list[ModelSource]:
        """What an editor that starts loads, of what it was built to serve."""
        return self._follower.first(serves, [r.editor for r in self._alive() if r.editor])

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

    async def pid(self) -> int:
        return os.getpid()

    async def stop(self) -> bool:
        """The application ends: fronts finish their sessions. Returns whether all of them have."""
        self._ending = True
        fronts = {report.process for report in self._alive() if report.editor is None}
        return all(self._left.get(front) == 0 for front in fronts)

    async def models(self) -> list[dict[str, Any]]:
        """What may be chosen, version by version, with the number of editors that hold it and its
        share of new sessions; none while no editor holds any."""
        alive, found = [report for report in self._alive() if report.models], []
        for offer in self._placement.offers() if alive else ():
            for key in offer.keys:
                having = [report.models[key] for report in alive if key in report.models]
                share = offer.share if key == offer.target else 1 - offer.share
                found.append(
                    {
                        "model": offer.name,
                        **(having[0] if having else self._follower.described(key)),
                        "editors": len(having),
                        "share": round(share, 4) if offer.target else 1.0,
                    }
                )
        return found

    async def notes(self) -> list[str]:
        """See `Placement.notes`."""
        return self._placement.notes()

    async def snapshots(self) -> dict[str, Readings]:
        """Of every process that lives, of the hub itself, and what the others had counted."""
        alive = self._alive()
        metrics, models = self.metrics, {m["name"] for r in alive for m in r.models.values()}
        metrics.bytes.set(self.store.bytes)
        metrics.max_bytes.set(self.store.max_bytes)
        metrics.records.set(len(self.store))
        metrics.wanted.set(self._placement.wanted())
        metrics.ready.set(sum(bool(report.models) for report in alive))
        metrics.waiting.set(self._placement.waiting)
        for gauge in (metrics.holding, metrics.share, metrics.failed, metrics.build):
            gauge.clear()
        for model in await self.models():
            metrics.holding.labels(model["model"], model["name"]).set(model["editors"])
            metrics.share.labels(model["model"], model["name"]).set(model["share"])
        for key in self._catalog.failed:
            metrics.failed.labels(key).set(1)
        for model in models or {""}:
            metrics.build.labels(liveedit_version(), ray.__version__, model).set(1)
        return {
            **{report.process: report.metrics for report in alive},
            "hub": metrics.snapshot(),
            "gone": self._retired.snapshot(),
        }

    def _alive(self) -> list[Report]:
        self._sweep()
        return [report for _, report in self._reports.values()]

    def _sweep(self) -> None:
        """Called at every report, so it looks no further than at the first that lives."""
        limit = time.monotonic() - GONE_S
        while self._reports and (oldest := next(iter(self._reports.items())))[1][0] <= limit:
            name, (_, report) = oldest
            del self._reports[name]
            self._retired.add(name, report.metrics)
            if name not in self._stopping and not self._placement.asked_to_go(name):
                kind = "editor" if report.models else "front"
                self.metrics.lost.labels(kind).inc()
                log.warning("%s %s is gone, and nobody had asked it to", kind, name)
                if report.editor is not None and report.editor.loading:
                    self._catalog.fail(report.editor.loading, f"editor {name} died of it")
            self._catalog.gone([name])

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


def hub_name(app: str) -> str:
    """Of the hub that the application's processes share, by what they say to it: one that is left
    of another version of the code is not found, and ends when nobody reports there any more."""
    said = (Report, Orders, Record, Editor, Request, Placed, Waiting, Full, Retired)
    return f"hub-{app}-{dialect((*COMMIT_KINDS, *said, ServeSettings, Limits)).hex()}"


def liveedit_version() -> str:
    try:
        return version("liveedit")
    except PackageNotFoundError:  # a copied tree, as in an image
        return "unknown"


def link_host(settings: ServeSettings) -> str:
    """Where a process of the application listens for the others."""
    return settings.link_host or get_node_ip_address()
