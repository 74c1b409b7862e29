"""Fronts, a store and editors whose answers are known, in one thread and under one clock.

The front, its sessions and the store are the real ones. Sockets are ASGI's two calls. The editor is
that of `arithmetic`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from typing import Any

from serve.front.door import Door
from serve.front.front import Front
from serve.hub.commits import Commits, take
from serve.hub.ledger import Ledger, Usage
from serve.hub.records import Commit, SessionStore
from serve.limits import Limits
from serve.metrics import Metrics
from serve.tenants import Tenants
from serve.versions.catalog import Menu
from serve.versions.rolling import Offer, Version
from serve.wire.codec import Frame, parse_frame
from serve.work_sizes import WorkSizes
from tests.serve.front.arithmetic import SIDE, Editors, source
from tests.serve.front.clock import Clock

OPEN: dict[str, Any] = {
    "type": "open", "prompt": "prompt 0", "width": SIDE, "height": SIDE, "fps": 16,
    "mode": "lossless", "format": "rgb24",
}  # fmt: skip


class StoreLink:
    """A front's way to the shared store; a dead front says nothing any more."""

    def __init__(self, store: SessionStore, world: World) -> None:
        self.create, self.claim = store.create, store.claim
        self.store, self.world, self.dead = store, world, False
        self._commits = Commits(partial(take, store))

    async def commit(self, commit: Commit) -> bool:
        await self.world.commits_go_on.wait()
        held = await self._commits.commit(commit)
        if held:
            self.world.committed = commit.progress.edited
        return held

    async def beat(self, held: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return [] if self.dead else await self.store.beat(held)

    async def release(self, token: str, epoch: int, *, forget: bool = False) -> None:
        self._commits.forget(token, epoch)
        if not self.dead:
            await self.store.release(token, epoch, forget=forget)


class Inline(Executor):
    """Image codecs, in the only thread there is."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class Wire:
    """A client's socket, by default to a front of its own."""

    def __init__(
        self,
        world: World,
        *,
        subprotocols: list[str],
        query: str = "",
        front: Front | None = None,
        headers: dict[str, str] | None = None,
        address: str = "198.51.100.7",
    ) -> None:
        self.world = world
        self.heard: list[dict[str, Any] | Frame] = []
        self.code: int | None = None  # the server's close code
        self.reading = asyncio.Event()
        self.reading.set()
        self.cut = False
        self.link = StoreLink(world.store, world)
        self.front = front or world.front(self.link)
        self.ended_at: float | None = None
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "websocket.connect"})
        scope = {
            "type": "websocket", "subprotocols": subprotocols, "query_string": query.encode(),
            "headers": [(n.encode(), v.encode()) for n, v in (headers or {}).items()],
            "client": [address, 4711],
        }  # fmt: skip
        self.task = world.clock.task(self.front.stream(scope, self._receive, self._send))
        self.task.add_done_callback(self._ended)

    def say(self, message: dict[str, Any] | bytes | str) -> None:
        data = json.dumps(message) if isinstance(message, dict) else message
        kind = "bytes" if isinstance(data, bytes) else "text"
        self._incoming.put_nowait({"type": "websocket.receive", kind: data})

    def disconnect(self) -> None:
        self.cut = True
        self.reading.set()
        self._incoming.put_nowait({"type": "websocket.disconnect", "code": 1006})

    def kill_front(self) -> None:
        """As a machine that loses its power: nothing more is heard of it."""
        self.link.dead = self.cut = True
        self.reading.set()
        self.task.cancel()

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [item for item in self.heard if isinstance(item, dict)]

    @property
    def frames(self) -> list[Frame]:
        return [item for item in self.heard if isinstance(item, Frame)]

    async def _receive(self) -> dict[str, Any]:
        return await self._incoming.get()

    async def _send(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "websocket.send" and self.heard:  # the first message is always taken
            await self.reading.wait()
        if self.cut:
            raise OSError("the client is gone")
        if kind == "websocket.close":
            self.code = message["code"]
        elif kind == "websocket.send":
            data = message.get("bytes")
            frame = None if data is None else parse_frame(data)
            self.heard.append(json.loads(message["text"]) if frame is None else frame)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.ended_at = self.world.clock.now
        if not task.cancelled():
            task.result()


class World:
    def __init__(
        self,
        limits: Limits | None = None,
        tenants: Tenants | None = None,
        origins: tuple[str, ...] = (),
    ) -> None:
        self.limits = limits or Limits(idle_timeout_s=1e6, stalled_reader_s=1e6)
        self.door = Door(tenants or Tenants(), origins)
        self.clock = Clock()
        self.clock.start()
        self.ledger = Ledger(clock=lambda: self.clock.now)
        self.store = SessionStore(self.limits.resume_s, clock=lambda: self.clock.now)
        self.editors = Editors()
        self.metrics = Metrics()
        self.committed = 0  # edited frames that are safe, of the latest commit
        self.commits_go_on = asyncio.Event()
        self.commits_go_on.set()
        self.menu = Menu((Offer("known", "known 1"),), {"known 1": Version("known 1", (48, 64))})
        self.notes: list[str] = []

    async def tell_notes(self) -> list[str]:
        return self.notes

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.clock.stop()

    def front(self, link: StoreLink) -> Front:
        async def models() -> list[dict[str, Any]]:
            return [{"name": "known"}]

        async def snapshots() -> dict[str, Any]:
            return {"front": self.metrics.snapshot()}

        front = Front(
            backend=self.editors,
            store=link,  # type: ignore[arg-type]
            sizes=WorkSizes(self.limits),
            metrics=self.metrics,
            door=self.door,
            ledger=self.ledger,
            models=models,
            menu=lambda: self.menu,
            notes=self.tell_notes,
            snapshots=snapshots,
        )
        usage = Usage("front", clock=lambda: self.clock.now)
        front.services = replace(front.services, codecs=Inline(), usage=usage)
        return front

    def connect(
        self,
        *said: Any,
        subprotocols: tuple[str, ...] = ("liveedit.v1",),
        query: str = "",
        headers: dict[str, str] | None = None,
    ) -> Wire:
        """A socket to a new front, on which `said` has been said."""
        wire = Wire(self, subprotocols=list(subprotocols), query=query, headers=headers)
        for message in said:
            wire.say(message)
        self.clock.settle()
        return wire

    def settle(self) -> None:
        self.clock.settle()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def sample(self, name: str, **labels: str) -> float:
        """A metric's value over all that have these labels, 0 before it was ever touched."""
        return sum(
            sample.value
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == f"liveedit_{name}" and labels.items() <= sample.labels.items()
        )


def frames(first: int, count: int) -> list[bytes]:
    """Source frames as they are sent."""
    return [Frame(n, 1000 + n, source(n).tobytes()).to_bytes() for n in range(first, first + count)]
