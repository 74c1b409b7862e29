"""The front: sockets and HTTP routes of one process, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.runtime.paths import ROOT
from serve.front.body import BodyFlow
from serve.front.connection import Connection
from serve.front.door import Door, Guard, refusal
from serve.front.edits import Edits, VideoEdit
from serve.front.running import Services
from serve.front.socket import Socket
from serve.front.traces import tracer
from serve.hub.ledger import Ledger, Usage
from serve.hub.records import HOLDER_BEAT_S, SessionStore
from serve.metrics import Metrics, Readings, render
from serve.tenants import Tenant
from serve.versions.catalog import Menu
from serve.wire.link import Listener
from serve.wire.protocol import PATH, RETRY_AFTER_S, SPENT, WireError
from serve.wire.work import Backend
from serve.work_sizes import WorkSizes

T = TypeVar("T")

log = logging.getLogger(__name__)

WEB = Path(__file__).parent.parent / "web"
UNAVAILABLE = 503  # whatever the reason: a probe asks later
SAMPLES = ROOT / "data" / "samples"
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
THERE = f"GET /v1/models, POST /v1/edits and a WebSocket at {PATH}"


class Front:
    """Owns the connections of one process. `app` is what a server runs.

    Args:
        sizes: What may be asked for, and the size that frames are edited at.
        door: Who is let in.
        ledger: Where tenants' limits are kept.
        name: Of this process, among the application's.
        traces: Where chunks' ways are told, see `serve.front.traces.tracer`; None: nowhere.
        listener: For links from the process that owns the sockets, see `serve.front.socket`.
        grace_s: For whole videos to be finished when this process goes away.
        models: What `/v1/models` lists. Raises WireError while no editor is warmed up.
        menu: What clients choose from.
        notes: What an operator should know of the models.
        snapshots: The metrics of every process, for `/metrics`.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        store: SessionStore,
        sizes: WorkSizes,
        metrics: Metrics,
        door: Door,
        ledger: Ledger,
        name: str = "front",
        grace_s: float = 30.0,
        traces: str | None = None,
        listener: Listener | None = None,
        models: Callable[[], Awaitable[list[dict[str, Any]]]],
        menu: Callable[[], Menu],
        notes: Callable[[], Awaitable[list[str]]],
        snapshots: Callable[[], Awaitable[dict[str, Readings]]],
    ) -> None:
        codecs = Codecs(metrics)
        made = tracer(traces, name) if traces else None
        self.services = Services(
            backend, store, sizes, metrics, codecs, ledger, Usage(name), menu, made
        )
        self.door, self.grace_s = door, grace_s
        self.connections: dict[Connection, None] = {}  # in order of their coming
        self._models, self._notes, self._snapshots = models, notes, snapshots
        self._listener = listener
        self._leaving = False
        self._grace_ends = math.inf
        self.edits = Edits(self.services, self._full)
        self._beating: asyncio.Task[None] | None = None
        stalled_s = sizes.limits.stalled_reader_s
        self.app = Starlette(
            routes=[
                WebSocketRoute(PATH, _Asgi(self.stream)),
                Route("/v1/models", self.models),
                Route("/v1/edits", BodyFlow(_Asgi(self.edit), stalled_s), methods=["POST"]),
                Route("/v1/{rest:path}", _unknown, methods=METHODS),
                Route("/healthz", self.health),
                Route("/readyz", self.ready),
                Route("/metrics", self.metrics),
                Mount("/samples", StaticFiles(directory=SAMPLES)),
                Mount("/", StaticFiles(directory=WEB, html=True)),
            ],
            middleware=[Middleware(Guard, door=door)],
        )

    def leave(self) -> None:
        """This process is going away: every client is told to come back with its token. Whole
        videos cannot move; they have `grace_s`."""
        if not self._leaving:
            self._grace_ends = time.monotonic() + self.grace_s
        self._leaving = True
        for connection in self.connections:
            connection.leave()

    def stop(self) -> None:
        """The application ends: what has come in is edited, and every client hears of it."""
        self._leaving = True
        for connection in self.connections:
            connection.stop()

    @property
    def open_connections(self) -> int:
        return len(self.connections) + self.edits.running

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The WebSocket route."""
        visitor = None
        try:
            visitor = self.door.enter(scope)
            refusal = self._full()
        except WireError as error:
            refusal = error
        self._beat_on()
        self._quieten()
        socket = Socket(scope, receive, send, self._listener)
        connection = Connection(socket, self.services, visitor, full=self._full)
        self.connections[connection] = None
        try:
            await connection.run(refusal=refusal)
        finally:
            del self.connections[connection]
            socket.end()

    async def edit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/edits`."""
        self._beat_on()
        response = await self.edits.post(Request(scope, receive, send))
        await response(scope, receive, send)

    def _full(self) -> WireError | None:
        """What speaks against any new session here."""
        if self._leaving:
            return WireError("draining", "this server is going away; open again")
        silent = sum(connection.silent for connection in self.connections)
        if self.open_connections - silent >= self.services.limits.max_sessions:
            return WireError(
                "at_capacity", "this front has no room; try again later", RETRY_AFTER_S
            )
        return None

    def _quieten(self) -> None:
        """Connections without a session are few: of the address that has most of them, which is
        hardly an honest client's, the oldest gives way to a new one."""
        silent = [connection for connection in self.connections if connection.silent]
        if len(silent) >= self.services.limits.max_silent:
            ((most, _),) = Counter(connection.client for connection in silent).most_common(1)
            next(connection for connection in silent if connection.client == most).give_way()

    def _beat_on(self) -> None:
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        """Keeps this front's sessions alive in the store and the ledger, and lets go of those that
        it lost, whose token was withdrawn, or whose tenant's minutes are used up."""
        while True:
            await asyncio.sleep(HOLDER_BEAT_S)
            held = {c.held: c for c in self.connections if c.held}
            lost = set(await self.services.store.beat(list(held)))
            for (token, epoch), connection in held.items():
                if (token, epoch) in lost:
                    connection.supersede()
            await self._settle()
            if time.monotonic() > self._grace_ends:
                self.edits.leave()

    async def _settle(self) -> None:
        """With the tenants, as their file is now."""
        holders: list[Connection | VideoEdit] = [*self.connections, *self.edits.open]
        tenants: dict[Connection | VideoEdit, Tenant] = {}
        for holder in holders:
            tenant = self.door.still(holder.visitor) if holder.visitor else None
            if tenant is not None:
                tenants[holder] = tenant
            elif holder.visitor is not None:
                holder.revoke()
        used = self.services.usage.used()
        spent = await self.services.ledger.beat(used, {t.name: t for t in tenants.values()})
        for holder, tenant in tenants.items():
            if tenant.name in spent:
                holder.stop(SPENT)

    async def models(self, request: Request) -> Response:
        try:
            models = await self._models()
            return JSONResponse({"models": [{**model, **self._takes()} for model in models]})
        except WireError as error:
            return refusal(error, UNAVAILABLE)

    def _takes(self) -> dict[str, Any]:
        """What holds for sessions with any model here."""
        sizes, limits = self.services.sizes, self.services.limits
        return {
            "work_size": sizes.choice,
            "detail": sizes.detail,
            "max_side": limits.max_side,
            "max_pixels": limits.max_pixels,
            "max_work_pixels": limits.max_work_pixels,
        }

    async def health(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok", "sessions": len(self.connections)})

    async def ready(self, request: Request) -> Response:
        """An editor is warmed up, and new sessions are taken."""
        try:
            if self._leaving:
                raise WireError("draining", "this front is going away")
            await self._models()
            notes = await self._notes()
        except WireError as error:
            return refusal(error, UNAVAILABLE)
        return JSONResponse({"status": "ready", **({"notes": notes} if notes else {})})

    async def metrics(self, request: Request) -> Response:
        return Response(render(await self._snapshots()), media_type=CONTENT_TYPE_LATEST)


class Codecs(ThreadPoolExecutor):
    """Threads that decode and encode images; `codec_queue` counts what they have to do."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(os.cpu_count(), thread_name_prefix="codec")
        self._queue = metrics.codec_queue

    def submit(self, function: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        done = super().submit(function, *args, **named)
        self._queue.inc()
        done.add_done_callback(lambda _: self._queue.dec())
        return done


class _Asgi:
    """A method as an ASGI application (a plain function would be taken for an endpoint)."""

    def __init__(self, call: ASGIApp) -> None:
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.call(scope, receive, send)


async def _unknown(request: Request) -> Response:
    """A mistyped address is told what there is."""
    asked = f"{request.method} {request.url.path[:60]}"
    return refusal(WireError("bad_request", f"there is no {asked}; there are {THERE}"), 404)
