"""Connections between our processes: one TCP connection carries a session's pixels.

A hop through Ray costs milliseconds on a small machine and a chunk would make three, so Ray carries
what opens and pins a session, and a link what flows in it. Who shall come gets an `Address` through
Ray; when either end dies, the other sees the connection close, and where its machine or the way to
it is gone without a word, the kernel does so after `SILENT_S`. Of a stranger nothing is read but as
many bytes as a secret has, and who is built from another version of the code is not let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from serve.wire.pack import DIALECT_BYTES, dialect, pack, parse, unpack
from serve.wire.pipe import Pipe

log = logging.getLogger(__name__)

LENGTH = struct.Struct("<I")
MAX_HEADER = 256 * 1024  # bytes; three prompts of 2,000 characters are 24 KiB
HELLO_S = 5.0  # for a connection to be made, and for a stranger to say who it is
SECRET_BYTES = 32
SILENT_S = 4  # without a sign of life of the other end's kernel; a session has 10 to go on

Kinds = Collection[type]  # the dataclasses that may come


@dataclass(frozen=True)
class Address:
    """Where a process listens for another, and the secret that lets it in."""

    host: str
    port: int
    secret: bytes


class Link:
    """One end of a connection, on which messages of `kinds` may come."""

    def __init__(self, pipe: Pipe, kinds: Kinds) -> None:
        self._pipe, self._kinds = pipe, kinds

    @classmethod
    async def connect(cls, address: Address, kinds: Kinds) -> Link:
        """Raises OSError when nobody answers there in time."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(HELLO_S):
            _, pipe = await loop.create_connection(Pipe, address.host, address.port)
            _expect_life(pipe)
            await pipe.write([address.secret, dialect(kinds)])
        return cls(pipe, kinds)

    async def write(self, message: Any) -> None:
        """Raises OSError when the other end is gone."""
        header, parts = pack(message)
        await self._pipe.write([LENGTH.pack(len(header)), header, *parts])

    async def read(self) -> Any:
        """The next message. Raises OSError when the other end is gone, or says what is none."""
        (length,) = LENGTH.unpack(await self._pipe.read(LENGTH.size))
        if length > MAX_HEADER:
            raise ConnectionError(f"a header of {length} bytes")
        header = await self._pipe.read(length)
        try:
            plain, sizes = parse(header)
            # In one piece: a commit has twenty small parts.
            whole = np.empty(sum(sizes), np.uint8)
            await self._pipe.read_into(whole.data)
            ends = zip(sizes, accumulate(sizes), strict=True)
            parts = [whole[end - size : end] for size, end in ends]
            return unpack(plain, parts, self._kinds)
        except ValueError as error:
            raise ConnectionError(str(error)) from error

    def finish(self) -> None:
        """No message follows; the other end reads those before, and closes."""
        self._pipe.finish()

    def close(self) -> None:
        """What is on its way may be lost."""
        self._pipe.close()


def _expect_life(pipe: Pipe) -> None:
    """Ask the other end's kernel for an answer every second, and end the connection when none came
    for `SILENT_S`; what was sent and not acknowledged counts, which keepalive alone leaves to
    retransmission for a quarter of an hour."""
    connection = pipe.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": SILENT_S,
        "TCP_USER_TIMEOUT": 1000 * SILENT_S,
    }  # fmt: skip
    for name, value in options.items():
        if hasattr(socket, name):  # macOS has not all of them, and one machine there is enough
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Listener:
    """Where a process hears of others: a port of its own, and a secret for each that may come."""

    def __init__(self, host: str, kinds: Kinds) -> None:
        self.host, self.kinds = host, kinds
        self._expected: dict[bytes, Callable[[Link], Awaitable[None]]] = {}
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()
        self._welcomes: set[asyncio.Task[None]] = set()

    async def expect(self, came: Callable[[Link], Awaitable[None]]) -> Address:
        """`came` is called with every connection that says the address's secret. It may raise
        OSError, and closes what it is given."""
        async with self._starting:
            if self._server is None:
                loop = asyncio.get_running_loop()
                self._server = await loop.create_server(self._pipe, self.host, 0)
        port = self._server.sockets[0].getsockname()[1]
        address = Address(self.host, port, secrets.token_bytes(SECRET_BYTES))
        self._expected[address.secret] = came
        return address

    async def answer(self, answer: Callable[[Any], Awaitable[Any]]) -> Address:
        """Where an `Asker` finds who answers every message with what `answer` makes of it."""

        async def serve(link: Link) -> None:
            try:
                while True:
                    await link.write(await answer(await link.read()))
            finally:
                link.close()

        return await self.expect(serve)

    def forget(self, address: Address) -> None:
        """Nobody is let in with this secret any more."""
        self._expected.pop(address.secret, None)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def _pipe(self) -> Pipe:
        def made(pipe: Pipe) -> None:
            welcome = asyncio.ensure_future(self._welcome(pipe))
            self._welcomes.add(welcome)
            welcome.add_done_callback(self._welcomes.discard)

        return Pipe(made)

    async def _welcome(self, pipe: Pipe) -> None:
        try:
            async with asyncio.timeout(HELLO_S):
                given = await pipe.read(SECRET_BYTES)
                came = self._known(given)
                spoken = await pipe.read(DIALECT_BYTES)
            if spoken != dialect(self.kinds):
                log.warning("a process built from another version of the code is not let in")
                raise ConnectionError("another version")
        except OSError as error:
            log.debug("a stranger, or one who is not expected any more: %s", error)
            pipe.close()
            return
        _expect_life(pipe)
        try:
            await came(Link(pipe, self.kinds))
        except OSError as error:
            log.debug("a connection ends: %s", error)

    def _known(self, secret: bytes) -> Callable[[Link], Awaitable[None]]:
        for expected, came in self._expected.items():
            if hmac.compare_digest(expected, secret):
                return came
        raise ConnectionError("a wrong secret")


class Asker:
    """Questions to one process over one link, answered in turn; `find` says where it listens."""

    def __init__(self, find: Callable[[], Awaitable[Address]], kinds: Kinds) -> None:
        self._find, self._kinds = find, kinds
        self._link: Link | None = None
        self._turn = asyncio.Lock()

    async def ask(self, question: Any) -> Any:
        """The answer. Raises OSError when nobody is found who gives one."""
        async with self._turn:
            with contextlib.suppress(OSError):  # one that was started again listens elsewhere
                return await self._ask(question)
            return await self._ask(question)

    async def _ask(self, question: Any) -> Any:
        answered = False
        try:
            async with asyncio.timeout(HELLO_S):
                if self._link is None:
                    self._link = await Link.connect(await self._find(), self._kinds)
                await self._link.write(question)
                answer = await self._link.read()
            answered = True
            return answer
        finally:
            if not answered:  # cancelled or failed half way: what comes next would be out of step
                self._drop()

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
