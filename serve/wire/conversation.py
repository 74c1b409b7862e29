"""What a front and an editor say about one stream, over a link of its own.

The editor asks for work when it has room and answers with what it edited, so a front is never
ahead of it. What opens the stream and holds its place is not of this: see `pin`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from serve.wire.link import Address, Link, Listener
from serve.wire.protocol import Error, WireError
from serve.wire.split_state import HistoryPart, SplitState
from serve.wire.work import (
    Asks,
    Backend,
    Edited,
    EditorEvent,
    EditorLostError,
    Frames,
    Moved,
    Opening,
    Ready,
    Superseded,
    SupersededError,
    Take,
    Work,
)

T = TypeVar("T")

KINDS = (Asks, Work, Ready, Frames, Edited, Moved, Superseded, Error, SplitState, HistoryPart)
LAST_WORDS_S = 1.0  # between the two ways in which the end of an editor is heard


async def answer(backend: Backend, opening: Opening, link: Link) -> None:
    """The editor's side, to the end of the stream. Raises OSError when the front let go of it."""

    async def take() -> Work:
        await link.write(Asks())
        work = await link.read()
        assert isinstance(work, Work), work
        return work

    try:
        async with aclosing(backend.edit(opening, take)) as events:
            async for event in events:
                await link.write(event)
    except SupersededError:
        await link.write(Superseded())
    except WireError as error:
        await link.write(error.told)


class Conversation:
    """The front's side, inside `async with`; the editor connects to `address`."""

    address: Address

    def __init__(self, listener: Listener, take: Take) -> None:
        self._listener, self._take = listener, take
        self._came: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._taking: asyncio.Future[Work] | None = None
        self._given_last = self._over = False

    async def __aenter__(self) -> Conversation:
        self.address = await self._listener.expect(self._welcome)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.forget(self.address)
        for task in list(self._tasks):
            task.cancel()
        if self._came.done():
            self._came.result().close()
        self._came.cancel()

    def pin(self, call: Awaitable[None]) -> None:
        """`call` lives as long as the stream; it may raise why it ended."""
        self._pinned = self._start(call)
        self._hearing = self._start(self._hear())

    async def reached(self) -> None:
        """Returns when the editor has connected, or its call has ended."""
        waiting: set[asyncio.Future[Any]] = {self._came, self._pinned}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def next(self) -> EditorEvent | None:
        """What the editor says next, None after the last; it is given work meanwhile.

        Raises what ended the stream: WireError, SupersededError or EditorLostError.
        """
        while not self._over:
            waiting: set[asyncio.Future[Any]] = {self._hearing, self._pinned}
            waiting |= {self._taking} if self._taking else set()
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._pinned.done() and not self._hearing.done() and self._may_be_heard:
                await asyncio.wait({self._hearing}, timeout=LAST_WORDS_S)
            if self._hearing.done():
                if self._hearing.exception():
                    await asyncio.wait({self._pinned}, timeout=LAST_WORDS_S)
                    if self._pinned.done():  # the call's own error says more than a closed link
                        self._pinned.result()
                message, self._hearing = self._hearing.result(), self._start(self._hear())
                if not isinstance(message, Asks):
                    after_last = self._given_last and isinstance(message, Edited)
                    self._over = after_last or isinstance(message, Moved)
                    return message
                self._taking = self._start(self._take())
            elif self._pinned.done():
                self._pinned.result()
                raise EditorLostError("the editor ended the stream")
            elif self._taking is not None:
                work, self._taking = self._taking.result(), None
                self._given_last = work.last
                await self._guard(self._came.result().write(work))
        return None

    @property
    def _may_be_heard(self) -> bool:
        """What an editor said before it ended may still be on its way."""
        return self._came.done() or not self._pinned.exception()

    async def _welcome(self, link: Link) -> None:
        if self._came.done():  # one editor has a stream
            link.close()
        else:
            self._came.set_result(link)

    async def _hear(self) -> Asks | EditorEvent:
        link = await asyncio.shield(self._came)
        message: Asks | EditorEvent | Superseded | Error = await self._guard(link.read())
        if isinstance(message, Superseded):
            raise SupersededError
        if isinstance(message, Error):
            raise WireError.of(message)
        return message

    async def _guard(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except OSError as error:
            raise EditorLostError(f"the editor cannot be heard: {error}") from error

    def _start(self, call: Awaitable[T]) -> asyncio.Future[T]:
        task = asyncio.ensure_future(call)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of those that nobody asks any more: the stream is over
