"""Commits over a connection of their own: the one call to the hub that every chunk waits for.

Through Ray it costs 6 ms on a small machine, most of it for the state; this way it costs one.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from serve.hub.records import Entry, Header, Progress, SessionStore
from serve.wire.link import BUFFER, HELLO_S, Link, new_secret, read_secret
from serve.wire.work import Opening, Ready

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommitAddress:
    host: str
    port: int
    secret: bytes


class CommitServer:
    """The hub's end."""

    def __init__(self, store: SessionStore, host: str) -> None:
        self.store, self.host = store, host
        self.secret = new_secret()
        self._server: asyncio.Server | None = None

    async def address(self) -> CommitAddress:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, self.host, 0, limit=BUFFER)
        port = self._server.sockets[0].getsockname()[1]
        return CommitAddress(self.host, port, self.secret)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(reader, writer)
        try:
            if not hmac.compare_digest(await read_secret(reader), self.secret):
                raise ConnectionError("a wrong secret")
            while True:
                message, parts = await link.read()
                await link.write({"held": self._commit(message, parts)})
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            log.debug("a front's connection ends: %s", error)
        finally:
            link.close()

    def _commit(self, message: dict[str, Any], parts: list[bytes]) -> bool:
        state, *data = parts
        header = Header(
            opening=Opening(**message["opening"]),
            format=message["format"],
            ready=Ready(**message["ready"]),
        )
        values = message["progress"]
        dropped = tuple((first, count) for first, count in values.pop("dropped"))
        kept = state if message["has_state"] else None
        progress = Progress(**values, dropped=dropped, state=kept)
        entries = [
            Entry(position, piece.decode() if text else piece)
            for (position, text), piece in zip(message["entries"], data, strict=True)
        ]
        return self.store.commit(message["token"], message["epoch"], header, progress, entries)


class CommitClient:
    """A front's end; `find` asks Ray where the hub listens."""

    def __init__(self, find: Callable[[], Awaitable[CommitAddress]]) -> None:
        self._find = find
        self._link: Link | None = None
        self._turn = asyncio.Lock()

    async def commit(
        self, token: str, epoch: int, header: Header, progress: Progress, entries: list[Entry]
    ) -> bool:
        """See `SessionStore.commit`. Raises OSError when the hub cannot be reached."""
        values = asdict(replace(progress, state=None))
        del values["state"]
        message = {
            "token": token,
            "epoch": epoch,
            "opening": asdict(header.opening),
            "format": header.format,
            "ready": asdict(header.ready),
            "progress": values,
            "has_state": progress.state is not None,
            "entries": [(entry.position, isinstance(entry.data, str)) for entry in entries],
        }
        data = [e.data.encode() if isinstance(e.data, str) else e.data for e in entries]
        async with self._turn:
            try:
                return await self._ask(message, progress.state or b"", *data)
            except (OSError, asyncio.IncompleteReadError):
                self._drop()  # a hub that was started again listens elsewhere
            try:
                return await self._ask(message, progress.state or b"", *data)
            except asyncio.IncompleteReadError as error:
                raise ConnectionError("the hub closed the connection") from error

    async def _ask(self, message: dict[str, Any], *parts: bytes) -> bool:
        done = False
        try:
            async with asyncio.timeout(HELLO_S):
                if self._link is None:
                    address = await self._find()
                    self._link = await Link.connect(address.host, address.port, address.secret)
                await self._link.write(message, *parts)
                answer, _ = await self._link.read()
            done = True
            return bool(answer["held"])
        finally:
            if not done:  # cancelled or failed half way: what comes next would be out of step
                self._drop()

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
