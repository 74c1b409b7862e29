"""`work.Backend` on Ray Serve: one long streaming call to an editor replica is the session's pin.

The hub says to which replica. Chunks are fetched by the editor from the front's inbox, and come
back the same way.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.scaling.decisions import Request
from serve.scaling.placement import ASKS_S, Full, Placed, Places
from serve.wire.link import Inbox, Slot
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.work import (
    EditorLostError,
    Event,
    Moved,
    Opening,
    Queued,
    Ready,
    Refused,
    Superseded,
    SupersededError,
    Take,
    Work,
)
from serve.work_sizes import sizes_of

T = TypeVar("T")
Start = Callable[[Coroutine[Any, Any, T]], "asyncio.Future[T]"]

log = logging.getLogger(__name__)

OPEN_S = 5.0  # for a replica to answer, most of it waiting for a free one
LAST_WORDS_S = 1.0  # between the two ways in which the end of an editor is heard
TRIES = 4  # editors that are asked which have room by the hub's measure and none by their own


class RayBackend:
    def __init__(self, editors: DeploymentHandle, inbox: Inbox, places: Places) -> None:
        self.editors = editors.options(stream=True)
        self.inbox, self.places = inbox, places
        self._numbers = itertools.count()

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[Event]:
        """See `work.Backend.edit`."""
        tries = 0
        while True:
            stream = f"{opening.session}-{opening.epoch}-{next(self._numbers)}"
            opening = replace(opening, stream=stream)
            placed = False
            try:
                async with aclosing(self._placed(opening)) as places:
                    async for place in places:
                        if isinstance(place, Queued):
                            yield place
                            continue
                        placed = True
                        async for event in self._edit(place, opening, take):
                            yield event
                        return
            except TimeoutError:  # as many sessions as Serve lets it have
                message = "every editor is busy; try again later"
                raise WireError("at_capacity", message, RETRY_AFTER_S) from None
            except WireError as error:
                # An editor that has no room by its own, newer measure; the hub's word is the last.
                tries += placed
                if not placed or error.code != "at_capacity" or tries == TRIES:
                    raise
                await asyncio.sleep(ASKS_S)
            finally:
                await asyncio.shield(self.places.released(stream))

    async def _placed(self, opening: Opening) -> AsyncGenerator[Queued | str]:
        """Queued while nobody has room, then the editor. Raises WireError `at_capacity`."""
        request = Request(
            opening.stream, opening.session, sizes_of(opening), opening.fps,
            opening.epoch, opening.waits, opening.again,
        )  # fmt: skip
        while True:
            answer = await self.places.ask(request)
            if isinstance(answer, Placed):
                yield answer.editor
                return
            if isinstance(answer, Full):
                message = "no editor has room; try again later"
                raise WireError("at_capacity", message, RETRY_AFTER_S)
            yield Queued(answer.place, answer.expected_s)
            await asyncio.sleep(ASKS_S)

    async def _edit(self, editor: str, opening: Opening, take: Take) -> AsyncGenerator[Event]:
        slot = await self.inbox.open(opening.stream)
        tasks: set[asyncio.Future[Any]] = set()

        def start(call: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
            task = asyncio.ensure_future(call)
            tasks.add(task)
            task.add_done_callback(ended)
            return task

        def ended(task: asyncio.Future[Any]) -> None:
            tasks.discard(task)
            if not task.cancelled():
                task.exception()  # of those that nobody asks any more: the stream is over

        try:
            items = self.editors.options(session_id=editor).edit.remote(opening, slot.address)
        except (RayServeException, RayError) as error:
            raise EditorLostError(str(error)) from error
        try:
            async with asyncio.timeout(OPEN_S):
                ready = await start(_item(items))
            assert isinstance(ready, Ready)
            await slot.connected()
            yield ready
            async for event in self._events(slot, items, take, start):
                yield event
        finally:
            for task in list(tasks):
                task.cancel()
            items.cancel()
            self.inbox.close(slot)

    async def _events(
        self, slot: Slot, items: Any, take: Take, start: Start
    ) -> AsyncGenerator[Event]:
        """The conversation over the link, as long as the call that pins the session lives."""
        pinned = start(_item(items))  # never an item: it ends when the editor does
        hearing = start(slot.next())
        taking: asyncio.Future[Work] | None = None
        last = False
        while True:
            waiting = {hearing, pinned} | ({taking} if taking else set())
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if pinned.done() and not hearing.done():
                # What it said before it ended may still be on its way.
                await asyncio.wait({hearing}, timeout=LAST_WORDS_S)
            if hearing.done():
                if hearing.exception():
                    await asyncio.wait({pinned}, timeout=LAST_WORDS_S)
                    _raise(pinned, hearing)
                event = hearing.result()
                if event is None:  # the editor has room
                    taking = start(_taken(take))
                else:
                    yield event
                    if last or isinstance(event, Moved):
                        return
                hearing = start(slot.next())
            elif pinned.done():
                pinned.result()
            elif taking is not None:
                work, taking = taking.result(), None
                last = work.last
                await slot.put(work)


def _raise(*failed: asyncio.Future[Any]) -> None:
    """The first error of those that are done: the call's own says more than a closed link."""
    for future in failed:
        if future.done():
            future.result()


async def _taken(take: Take) -> Work:
    return await take()


async def _item(items: Any) -> Ready:
    """The next item of the streaming call. Raises WireError and EditorLostError."""
    try:
        item = await anext(items)
    except RayTaskError as error:
        log.error("an editor failed: %s", error)
        raise WireError("internal", "the editor failed; its log says why") from error
    except StopAsyncIteration:
        raise EditorLostError("the editor ended the stream") from None
    except (RayError, RayServeException) as error:
        raise EditorLostError(str(error).splitlines()[0]) from error
    if isinstance(item, Superseded):
        raise SupersededError
    if isinstance(item, Refused):
        raise WireError(item.code, item.message, item.retry_after_s)
    assert isinstance(item, Ready), item
    return item
