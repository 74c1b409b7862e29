"""Editors on Ray as a front sees them: the real inbox and link, and a handle, a hub and replicas
that are ours.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing
from typing import Any

import numpy as np

from serve.admission import admission
from serve.admission.admission import Request
from serve.admission.decisions import Scale
from serve.front.ray_backend import RayBackend
from serve.hub.placement import Answer, Placement
from serve.wire import conversation
from serve.wire.link import Address, Link, Listener
from serve.wire.protocol import WireError
from serve.wire.split_state import SplitState
from serve.wire.work import (
    Edited,
    EditorEvent,
    Frames,
    Moved,
    Opening,
    Ready,
    Take,
    Work,
)

OPENING = Opening("s", "p", 6, 4, 16.0, "live")
READY = Ready("m", 12, 9, 0)
Replica = Callable[[Opening, Address], Awaitable[None]]


class Call:
    """A call's answer: it can be awaited and cancelled."""

    def __init__(self, edit: Awaitable[None]) -> None:
        self.edit, self.cancelled = asyncio.ensure_future(edit), False

    def __await__(self) -> Generator[Any]:
        return self.edit.__await__()

    def cancel(self) -> None:
        self.cancelled = True
        self.edit.cancel()


class Handle:
    """A deployment handle whose n-th call goes to the n-th replica, the last one again.

    `chosen` are the editors that the calls were for.
    """

    def __init__(self, *replicas: Replica) -> None:
        self.replicas, self.calls, self.chosen = replicas, list[Call](), list[str]()
        self.openings: list[Opening] = []
        self.edit = self

    def options(self, *, session_id: str) -> Handle:
        self.chosen.append(session_id)
        return self

    def remote(self, opening: Opening, address: Address) -> Call:
        replica = self.replicas[min(len(self.calls), len(self.replicas) - 1)]
        self.openings.append(opening)
        self.calls.append(Call(replica(opening, address)))
        return self.calls[-1]


def listener() -> Listener:
    return Listener("127.0.0.1", conversation.KINDS)


class Hub:
    """`placement.Places` on a placement of its own, with empty `editors`."""

    def __init__(self, editors: str = "a") -> None:
        self.placement = Placement(Scale(1, 1))
        for name in editors:
            self.placement.report(admission.Editor(name, 12, 1))
        self.asked: list[Request] = []
        self.over: list[str] = []

    async def ask(self, request: Request) -> Answer:
        self.asked.append(request)
        return self.placement.ask(request)

    async def released(self, stream: str) -> None:
        self.over.append(stream)
        self.placement.released(stream)


def work(number: int, last: bool = False) -> Work:
    return Work(number, "p", np.full((2, 4, 6, 3), number, np.uint8), last)


def edited(given: Work) -> Edited:
    return Edited(given.number, given.number, 1.0, 4, 1.0, 0.0, 0.0, None, b"s")


class Editor:
    """`work.Backend`: edits `chunks` at most, then raises `error` or gives the stream back."""

    def __init__(self, error: Exception | None = None, chunks: int | None = None) -> None:
        self.error, self.chunks = error, chunks

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        if self.error and self.chunks is None:
            raise self.error
        yield READY
        for number in itertools.count():
            if number == self.chunks:
                if self.error:
                    raise self.error
                yield Moved(SplitState(b"state"), 4)
                return
            given = await take()
            yield Frames(given.frames)
            yield edited(given)
            if given.last:
                return


def replica(editor: Editor) -> Replica:
    """As `EditorReplica.edit`."""

    async def edit(opening: Opening, address: Address) -> None:
        link = await Link.connect(address, conversation.KINDS)
        try:
            await conversation.answer(editor, opening, link)
        finally:
            link.close()

    return edit


good = replica(Editor())


def refusing(code: Any) -> Replica:
    return replica(Editor(WireError(code, "no", 3.0)))


async def silent(opening: Opening, address: Address) -> None:
    await asyncio.sleep(60)


def raising(error: Exception, *, after: int | None = None) -> Replica:
    """Before it connects, or after so many chunks."""

    async def edit(opening: Opening, address: Address) -> None:
        if after is not None:
            await replica(Editor(error, after))(opening, address)
        raise error

    return edit


async def run(
    *replicas: Replica, works: int = 3, hub: Hub | None = None, opening: Opening = OPENING
) -> tuple[list[Any], Handle]:
    handle, hub = Handle(*replicas), hub or Hub()
    backend = RayBackend(handle, listener(), hub)  # type: ignore[arg-type]
    given = iter([work(n, n == works - 1) for n in range(works)])

    async def take() -> Work:
        return next(given)

    events = []
    try:
        async with asyncio.timeout(20), aclosing(backend.edit(opening, take)) as stream:
            async for event in stream:
                events.append(event)
    finally:
        await asyncio.sleep(0)
        assert all(call.cancelled for call in handle.calls), "a call was left behind"
        assert backend.listener._expected == {}, "an address was left behind"
        backend.listener.close()
        assert hub.over == list(dict.fromkeys(asked.stream for asked in hub.asked))
        assert hub.placement.waiting == 0
        assert all(not e.streams for e in hub.placement.editors), "a place was left behind"
    return events, handle
