"""A session while a client is connected: the tasks between its socket, its editor and the store.

socket -> read -> Session -> editor -> edit -> finish (encoded, commit) -> outbox -> write -> socket
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.delivery.driver import drive
from serve.delivery.pacing import PacedOutbox
from serve.delivery.session import Delivery, Session
from serve.front.account import Account
from serve.front.coder import FrameCoder
from serve.front.door import Visitor
from serve.front.socket import Socket
from serve.front.traces import ChunkTraces
from serve.hub.ledger import Ledger, Usage
from serve.hub.records import Commit, Entry, Header, Progress, Record, SessionStore
from serve.limits import Limits
from serve.metrics import Metrics
from serve.versions.catalog import Menu
from serve.wire import codec
from serve.wire.codec import parse_frame
from serve.wire.protocol import (
    SPENT,
    STOPPED,
    Close,
    Closed,
    Format,
    InQueue,
    Open,
    Opened,
    Prompt,
    WireError,
    parse_client,
    to_json,
)
from serve.wire.work import (
    Backend,
    Frames,
    Opening,
    Queued,
    Ready,
    SupersededError,
    new_session,
)
from serve.work_sizes import WorkSizes

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

Made = tuple[Delivery, np.ndarray]  # and its edited frames, uint8 [n, height, width, 3]

TICK_S = 0.5  # how often the time limits are looked at
QUEUED_EVERY_S = 5.0  # who waits hears that often, and when its place changes


@dataclass(frozen=True)
class Services:
    """What every connection of a front shares."""

    backend: Backend
    store: SessionStore
    sizes: WorkSizes
    metrics: Metrics
    codecs: Executor
    ledger: Ledger
    usage: Usage
    menu: Callable[[], Menu]
    tracer: Tracer | None = None

    @property
    def limits(self) -> Limits:
        return self.sizes.limits

    def opening(self, message: Open, tenant: str) -> Opening:
        """A new session's. Raises WireError for a model or a size that is not to be had."""
        session = new_session()
        name, version = self.menu().choose(message.model, session)
        work_size, detail = self.sizes.of(message, version.trained)
        return Opening.of(message, session, tenant, work_size, detail, name, version.key)

    def account(self, visitor: Visitor, opening: Opening) -> Account:
        return Account(visitor, opening, metrics=self.metrics, ledger=self.ledger, usage=self.usage)


class RunningSession:
    """`run` returns when the client has everything and was told `closed`.

    Raises Disconnected, SupersededError and WireError. `token` is empty until an editor has taken
    the session.
    """

    def __init__(
        self,
        socket: Socket,
        services: Services,
        session: Session,
        account: Account,
        format: Format,
        record: Record | None,
        token: str,
    ) -> None:
        self.socket, self.services, self.session = socket, services, session
        self.opening, self.account = session.opening, account
        self.format, self.record = format, record
        self.token, self.epoch = token, record.epoch if record else 0
        self.reason = "close"
        self._progress = record.progress if record else Progress.start(session.prompt)
        self._coder = FrameCoder(services.codecs, format)
        self._committing = asyncio.Lock()
        self._frame_at = time.monotonic()
        self._traces = services.tracer and ChunkTraces(
            services.tracer, self.opening, account.visitor.tenant.name
        )

    async def run(self, ending: asyncio.Future[None]) -> None:
        """`ending` ends it early with the exception that is set on it."""
        services = self.services
        driven = drive(services.backend, self.session, services.metrics)
        async with aclosing(driven) as events:
            ready = await self._until_ready(events, ending)
            header = await self._admit(ready)
            outbox = PacedOutbox(mode=self.opening.mode, fps=self.opening.fps)
            if self.record is not None:
                missing = list(self.record.tail)
                self.session.unsent += sum(isinstance(entry.data, bytes) for entry in missing)
                outbox.put(missing)
            deliveries: asyncio.Queue[Made] = asyncio.Queue()
            writing = asyncio.create_task(outbox.run(self.socket.send, self._sent))
            tasks = [
                writing,
                asyncio.create_task(self._collect(events, deliveries)),
                asyncio.create_task(self._finish(header, deliveries, outbox)),
                asyncio.create_task(self._read(header, outbox)),
                asyncio.create_task(self._watch(outbox)),
            ]
            try:
                await _first_failure_or(writing, [*tasks, ending])
            finally:
                for task in tasks:
                    task.cancel()
                self._coder.close()
                await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self, reason: str) -> None:
        """What has come in is edited; frames that still come are not."""
        if self.session.accepts_frames:
            self.reason = reason
            self.session.finish()

    @property
    def _stopped(self) -> bool:
        return self.reason in (STOPPED, SPENT)

    async def _until_ready(
        self,
        events: AsyncGenerator[Queued | Ready | Frames | Delivery],
        ending: asyncio.Future[None],
    ) -> Ready:
        """Tells the client its place meanwhile; who has gone waits no longer."""
        gone = asyncio.create_task(self.socket.gone())
        told: tuple[int, float] = (0, 0.0)
        try:
            while True:
                coming = asyncio.ensure_future(anext(events))
                try:
                    waiting: set[asyncio.Future[Any]] = {coming, gone, ending}
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for early in (ending, gone):
                        if early.done():
                            early.result()
                    event = coming.result()
                finally:
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
                if isinstance(event, Ready):
                    return event
                assert isinstance(event, Queued)
                now = time.monotonic()
                if event.place != told[0] or now - told[1] > QUEUED_EVERY_S:
                    told = (event.place, now)
                    message = InQueue(event.place, round(event.expected_s, 1))
                    await self.socket.send(to_json(message))
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _admit(self, ready: Ready) -> Header:
        """An editor has the stream: now there is a session, and the client hears of it."""
        header = Header(self.opening, self.format, ready)
        if self.record is not None:
            header = self.record.header
        else:
            self.token = await self.services.store.create(header)
        self.account.opened(ready.model)
        await self.socket.send(opened_message(header, self.token, self.session.next_frame))
        return header

    # --- the tasks

    async def _read(self, header: Header, outbox: PacedOutbox) -> None:
        session, limits = self.session, self.services.limits
        width, height = self.opening.width, self.opening.height
        largest = limits.max_message(width, height)
        loop = asyncio.get_running_loop()
        while True:
            await session.room()
            data = await self.socket.receive()
            if self._stopped:
                continue
            if isinstance(data, bytes):
                if len(data) > largest:
                    raise WireError("bad_frame", f"{len(data)} bytes; at most {largest}")
                came, frame = time.monotonic(), parse_frame(data)
                decode = partial(codec.decode, frame.image, self.format, width=width, height=height)
                pixels = await loop.run_in_executor(self.services.codecs, decode)
                if self._stopped:  # meanwhile
                    continue
                drops = session.feed(frame.index, frame.time_us, pixels)
                self._frame_at = time.monotonic()
                if self._traces:
                    self._traces.read(frame.index, came)
                if drops:
                    async with self._committing:
                        await self._commit(header, self._progress, drops)
                        outbox.put(drops)
                continue
            message = parse_client(data)
            if isinstance(message, Prompt):
                limits.check_prompt(message.prompt)
                session.set_prompt(message.prompt)
            elif isinstance(message, Close):
                session.finish()
            else:
                raise WireError("bad_request", "the session is open already")

    async def _collect(
        self,
        events: AsyncIterator[Queued | Ready | Frames | Delivery],
        deliveries: asyncio.Queue[Made],
    ) -> None:
        async for event in events:
            if isinstance(event, Frames):
                frames = event.frames
                self._coder.begin(frames)
            else:
                assert isinstance(event, Delivery)
                deliveries.put_nowait((event, frames))

    async def _finish(
        self, header: Header, deliveries: asyncio.Queue[Made], outbox: PacedOutbox
    ) -> None:
        """Encodes each delivery and makes it safe in the store before the client gets it."""
        session = self.session
        while True:
            delivery, frames = await deliveries.get()
            coded = await self._coder.images(frames)
            async with self._committing:
                entries = session.entries(delivery, coded.images)
                if delivery.last:
                    closed = Closed(session.edited, self.reason)
                    entries.append(Entry(session.edited, to_json(closed)))
                progress = Progress(
                    next_frame=delivery.settled,
                    edited=session.edited,
                    prompt=session.prompt,
                    applied_prompt=session.applied_prompt,
                    state=delivery.edited.state,
                    finished=delivery.last,
                    quality=session.quality,
                )
                await self._commit(header, progress, entries)
                if self._traces:
                    self._traces.made(delivery, coded.begun, coded.done)
                whole = len(delivery.frames) == session.chunk_frames
                outbox.put(entries, delivery.frames[-1].arrived if whole else None)
            self.account.delivered(
                delivery, chunk_frames=session.chunk_frames, dropped=session.drops.count
            )
            if delivery.last:
                outbox.end()
                return

    async def _commit(self, header: Header, progress: Progress, entries: list[Entry]) -> None:
        """Raises SupersededError when another front holds the session."""
        dropped = tuple(self.session.drops.told_from(progress.next_frame))
        self._progress = progress = replace(progress, dropped=dropped)
        commit = Commit(self.token, self.epoch, header, progress, entries)
        if not await self.services.store.commit(commit):
            raise SupersededError

    async def _watch(self, outbox: PacedOutbox) -> None:
        """The time limits: a client that sends nothing, or takes nothing."""
        limits = self.services.limits
        while True:
            await asyncio.sleep(TICK_S)
            if outbox.stuck_s > limits.stalled_reader_s:
                raise WireError(
                    "too_slow",
                    f"no edited frame was taken for {limits.stalled_reader_s:g} s; read faster, "
                    "or send smaller frames",
                )
            quiet = time.monotonic() - self._frame_at
            if self.session.idle and quiet > limits.idle_timeout_s:
                self.reason = "idle"
                self.session.finish()

    def _sent(self) -> None:
        self.session.sent()
        if self._traces:
            self._traces.sent()
        self.account.sent(chunk_frames=self.session.chunk_frames, frame_at=self._frame_at)


def opened_message(header: Header, token: str, next_frame: int) -> str:
    opening, ready = header.opening, header.ready
    return to_json(
        Opened(
            session=opening.session,
            resume=token,
            model=ready.model,
            chunk_frames=ready.chunk_frames,
            first_chunk_frames=ready.first_chunk_frames,
            width=opening.width,
            height=opening.height,
            next_frame=next_frame,
            work_size=opening.work_size,
            detail=opening.detail,
            unknown=ready.unknown or None,
        )
    )


async def _first_failure_or(goal: asyncio.Task[None], futures: list[asyncio.Future[None]]) -> None:
    """Returns when `goal` is done; raises what any of `futures` raises before."""
    waiting = set(futures)
    while not goal.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            future.result()
    goal.result()
