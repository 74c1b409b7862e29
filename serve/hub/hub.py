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
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve._private.common import ReplicaState
from ray.serve.context import _get_global_client
from ray.util import get_node_ip_address

from serve.hub.commits import CommitAddress, CommitClient, CommitServer
from serve.hub.records import Entry, Header, Progress, Record, SessionStore
from serve.metrics import Snapshot

log = logging.getLogger(__name__)

NAMESPACE = "liveedit"
REPORT_S = 1.0  # how often a process reports
WATCH_S = 2.0  # how often Serve is asked which replicas have to stop
GONE_S = 10.0  # a process that has not reported for so long is gone
ALONE_S = 300.0  # without any report the hub ends itself


@dataclass(frozen=True)
class Report:
    """What a replica says of itself every `REPORT_S`; `model` is None for a front."""

    process: str  # the replica's id
    metrics: Snapshot
    model: dict[str, Any] | None = None


class Hub:
    """See the module; an async actor, so that its methods run on one event loop."""

    def __init__(self, app: str, resume_s: float) -> None:
        self.app = app
        self.store = SessionStore(resume_s)
        self._commits = CommitServer(self.store, get_node_ip_address())
        self._reports: dict[str, tuple[float, Report]] = {}
        self._stopping: set[str] = set()
        self._heard = time.monotonic()
        self._watching = asyncio.ensure_future(self._watch())

    # --- sessions, see SessionStore

    async def create(self, header: Header) -> str:
        return self.store.create(header)

    async def claim(self, token: str, received: int) -> Record:
        return self.store.claim(token, received)

    async def commits(self) -> CommitAddress:
        return await self._commits.address()

    async def beat(self, held: list[tuple[str, int]]) -> list[str]:
        return self.store.beat(held)

    async def release(self, token: str, epoch: int, forget: bool) -> None:
        self.store.release(token, epoch, forget=forget)

    # --- processes

    async def report(self, report: Report) -> bool:
        """Returns whether Serve wants this replica to stop, so that it gives its sessions back."""
        self._heard = time.monotonic()
        self._reports[report.process] = (self._heard, report)
        return report.process in self._stopping

    async def models(self) -> list[dict[str, Any]]:
        """The models that warmed-up editors hold, each once, with the number of its editors."""
        found: dict[str, dict[str, Any]] = {}
        for report in self._alive():
            if report.model is not None:
                model = found.setdefault(report.model["name"], {**report.model, "editors": 0})
                model["editors"] += 1
        return list(found.values())

    async def snapshots(self) -> dict[str, Snapshot]:
        return {report.process: report.metrics for report in self._alive()}

    def _alive(self) -> list[Report]:
        limit = time.monotonic() - GONE_S
        self._reports = {name: told for name, told in self._reports.items() if told[0] > limit}
        return [report for _, report in self._reports.values()]

    async def _watch(self) -> None:
        """Asks Serve which replicas have to stop: it tells a replica only when all is over."""
        while time.monotonic() - self._heard < ALONE_S:
            await asyncio.sleep(WATCH_S)
            try:
                found = await asyncio.to_thread(replicas, self.app)
                self._stopping = {replica.name for replica in found if replica.stopping}
            except ray.exceptions.RayError as error:  # the controller may be starting or gone
                log.warning("no word from Serve: %s", error)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


@dataclass(frozen=True)
class Replica:
    """What Serve's controller says of a replica."""

    name: str
    deployment: str
    state: ReplicaState
    pid: int | None

    @property
    def stopping(self) -> bool:
        return self.state is ReplicaState.STOPPING

    @property
    def running(self) -> bool:
        return self.state is ReplicaState.RUNNING


def replicas(app: str) -> list[Replica]:
    """The application's replicas; empty when Serve is not running."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return []
    # As plain values: parsing Serve's whole schema every few seconds costs a process 3 %.
    application = client.get_serve_details()["applications"].get(app)
    return [
        Replica(replica["replica_id"], name, ReplicaState(replica["state"]), replica.get("pid"))
        for name, deployment in (application["deployments"] if application else {}).items()
        for replica in deployment["replicas"]
    ]


def hub_actor(app: str, resume_s: float) -> Any:
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
        .remote(app, resume_s)
    )


class HubStore:
    """`store.Store` on the hub. While the hub is down sessions go on, but cannot be resumed."""

    def __init__(self, app: str, resume_s: float) -> None:
        self.app, self.resume_s = app, resume_s
        self.hub = hub_actor(app, resume_s)
        self._commits = CommitClient(lambda: self.call("commits"))

    async def call(self, method: str, *args: Any) -> Any:
        """One call, again on a new hub if the old one is gone for good."""
        try:
            return await getattr(self.hub, method).remote(*args)
        except RayActorError:
            self.hub = hub_actor(self.app, self.resume_s)
            return await getattr(self.hub, method).remote(*args)

    async def create(self, header: Header) -> str:
        token: str = await self.call("create", header)
        return token

    async def claim(self, token: str, received: int) -> Record:
        try:
            record: Record = await self.call("claim", token, received)
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

    async def beat(self, held: list[tuple[str, int]]) -> list[str]:
        with contextlib.suppress(RayActorError, ActorUnavailableError):
            lost: list[str] = await self.call("beat", held)
            return lost
        return []

    async def release(self, token: str, epoch: int, *, forget: bool = False) -> None:
        with contextlib.suppress(RayActorError, ActorUnavailableError):
            await self.call("release", token, epoch, forget)
