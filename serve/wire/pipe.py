"""A TCP connection's bytes, which are read straight to where they are wanted.

asyncio's streams copy what they read and write several times over: a chunk of 832x480 took the
loop of a front 17 ms, in which nothing else ran there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator

Piece = bytes | memoryview

AHEAD = 64 * 1024  # bytes that are read before they are wanted; more than these are read in place
SLICE = 256 * 1024  # bytes that are given to the kernel at once: what it does not take is copied


class Pipe(asyncio.BufferedProtocol):
    """One end; `made` hears of it when it is connected. Belongs to one event loop."""

    transport: asyncio.Transport

    def __init__(self, made: Callable[[Pipe], None] = lambda pipe: None) -> None:
        self._made = made
        self._ahead = memoryview(bytearray(AHEAD))
        self._start = self._end = 0  # of what is in it
        self._place: memoryview | None = None  # where what comes is wanted
        self._change: asyncio.Future[None] | None = None  # who reads waits for it
        self._full = self._ended = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._turn = asyncio.Lock()

    async def read_into(self, place: memoryview) -> None:
        """Fills `place`; by one caller at a time. Raises ConnectionError.

        Who gives up on it in the middle cannot read what follows.
        """
        while len(place) <= AHEAD and self._end - self._start < len(place):
            await self._more()
        count = min(len(place), self._end - self._start)
        place[:count] = self._ahead[self._start : self._start + count]
        self._start += count
        self._place = place[count:]
        while len(self._place):
            await self._more()
        self._place = None

    async def read(self, count: int) -> bytes:
        """So many bytes, as `read_into`."""
        data = bytearray(count)
        await self.read_into(memoryview(data))
        return bytes(data)

    async def write(self, pieces: Iterable[Piece]) -> None:
        """All of them, and nobody else's between. Returns when the kernel has nearly all.

        Raises ConnectionError when the other end is gone.
        """
        async with self._turn:
            slices = _slices(pieces)
            for piece in slices:
                if self.transport.is_closing():
                    raise ConnectionError("the connection is closed")
                self.transport.write(piece)
                try:
                    await self._writable.wait()
                except asyncio.CancelledError:  # a message that was begun is sent whole
                    for rest in slices:
                        self.transport.write(rest)
                    raise

    def finish(self) -> None:
        """Nothing is written any more; the other end reads what was."""
        with contextlib.suppress(OSError):  # it is gone
            self.transport.write_eof()

    def close(self) -> None:
        """The other end may miss what it has not read."""
        self.transport.close()

    async def _more(self) -> None:
        """Returns when something came. Raises ConnectionError when nothing will."""
        if self._ended:
            raise ConnectionError("the other end closed the connection")
        left = self._end - self._start
        self._ahead[:left] = bytes(self._ahead[self._start : self._end])
        self._start, self._end = 0, left
        if self._full:
            self._full = False
            self.transport.resume_reading()
        self._change = asyncio.get_running_loop().create_future()
        await self._change

    def _changed(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    # --- called by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self._made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._place if self._place else self._ahead[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._place:
            self._place = self._place[nbytes:]
            if self._place:
                return
        else:
            self._end += nbytes
            if self._end == AHEAD:
                self._full = True
                self.transport.pause_reading()
        self._changed()

    def eof_received(self) -> bool:
        self._ended = True
        self._changed()
        return True  # this end may write on

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        self._changed()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()


def _slices(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Small pieces together, large ones in slices."""
    small: list[Piece] = []
    size = 0
    for piece in pieces:
        if len(piece) < SLICE:
            small.append(piece)
            size += len(piece)
            if size < SLICE:
                continue
        if small:
            yield b"".join(small)
            small, size = [], 0
        if len(piece) >= SLICE:
            view = memoryview(piece)
            yield from (view[first : first + SLICE] for first in range(0, len(view), SLICE))
    if small:
        yield b"".join(small)
