"""Commits over a link: the one call to the hub that every chunk waits for.

Through Ray it costs 6 ms on a small machine, most of it for the state; this way it costs one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serve.hub.records import Entry, Header, Progress, SessionStore
from serve.wire.link import HELLO_S, Address, Link, Listener
from serve.wire.work import Opening, Ready


@dataclass(frozen=True)
class Commit:
    """The arguments of `SessionStore.commit`."""

    token: str
    epoch: int
    header: Header
    progress: Progress
    entries: list[Entry]


@dataclass(frozen=True)
class Held:
    """Its answer."""

    held: bool


KINDS = (Commit, Header, Opening, Ready, Progress, Entry, Held)


class CommitServer:
    """The hub's end."""

    def __init__(self, store: SessionStore, host: str) -> None:
        self.store, self.listener = store, Listener(host, KINDS)
        self._address: Address | None = None

    async def address(self) -> Address:
        self._address = self._address or await self.listener.expect(self._serve)
        return self._address

    async def _serve(self, link: Link) -> None:
        try:
            while True:
                asked = await link.read()
                held = await self.store.commit(
                    asked.token, asked.epoch, asked.header, asked.progress, asked.entries
                )
                await link.write(Held(held))
        finally:
            link.close()


class CommitClient:
    """A front's end; `find` asks Ray where the hub listens."""

    def __init__(self, find: Callable[[], Awaitable[Address]]) -> None:
        self._find = find
        self._link: Link | None = None
        self._turn = asyncio.Lock()

    async def commit(self, commit: Commit) -> bool:
        """See `SessionStore.commit`. Raises OSError when the hub cannot be reached."""
        async with self._turn:
            try:
                return await self._ask(commit)
            except OSError:
                self._drop()  # a hub that was started again listens elsewhere
            return await self._ask(commit)

    async def _ask(self, commit: Commit) -> bool:
        done = False
        try:
            async with asyncio.timeout(HELLO_S):
                if self._link is None:
                    self._link = await Link.connect(await self._find(), KINDS)
                await self._link.write(commit)
                answer = await self._link.read()
            done = True
            return bool(answer.held)
        finally:
            if not done:  # cancelled or failed half way: what comes next would be out of step
                self._drop()

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
