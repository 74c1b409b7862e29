"""From edited entries to the socket: in order, and in live mode at the source's frame rate."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serve.hub.records import Entry
from serve.wire.protocol import Mode

FASTEST = 0.5  # of the frame interval: how fast a delay is played away
RECENT = 4  # batches whose delays say how early the next one may be


@dataclass
class _Batch:
    """Frames that became ready together; they should be out when the next ones are expected."""

    frames: int  # still to be sent
    until: float  # time.monotonic()
    begun: bool = False


class PacedOutbox:
    """Entries that wait for the client.

    Live frames leave one frame interval apart, but what is late is played faster: a batch that
    came later after its source than those before it, and the rest of one whose successor is there.
    So a late chunk delays itself and not those that follow.
    """

    def __init__(self, *, mode: Mode, fps: float) -> None:
        self.interval = 1 / fps if mode == "live" else 0.0
        self.progress = time.monotonic()  # when the client last took something, or had nothing
        self._entries: deque[Entry] = deque()
        self._batches: deque[_Batch] = deque()
        self._delays: deque[float] = deque(maxlen=RECENT)
        self._more = asyncio.Event()
        self._ended = False
        self._left = 0.0  # when the last frame left

    def put(self, entries: list[Entry], arrived: float | None = None) -> None:
        """`arrived` is when the last source frame of a whole chunk came."""
        now = time.monotonic()
        if not self._entries:
            self.progress = now
        frames = sum(isinstance(entry.data, bytes) for entry in entries)
        if frames:
            late = 0.0
            if arrived is not None:
                self._delays.append(now - arrived)
                late = self._delays[-1] - min(self._delays)
            self._batches.append(_Batch(frames, now + frames * self.interval - late))
        self._entries.extend(entries)
        self._more.set()

    def end(self) -> None:
        """Nothing comes after what is there."""
        self._ended = True
        self._more.set()

    @property
    def stuck_s(self) -> float:
        """Seconds for which the client has not taken what was ready."""
        return time.monotonic() - self.progress if self._entries else 0.0

    async def run(
        self, send: Callable[[str | bytes], Awaitable[None]], sent: Callable[[], None]
    ) -> None:
        """Sends until `end`; `sent` is called after every frame."""
        while True:
            while not self._entries:
                if self._ended:
                    return
                self._more.clear()
                await self._more.wait()
            entry = self._entries[0]
            frame = isinstance(entry.data, bytes)
            if frame:
                await self._pace()
            await send(entry.data)
            self._entries.popleft()
            self.progress = time.monotonic()
            if frame:
                sent()

    async def _pace(self) -> None:
        """Returns when the next frame may leave."""
        while (pause := self._due() - time.monotonic()) > 0:
            self._more.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._more.wait()  # for a batch that makes the frame due at once
        self._left = time.monotonic()
        batch = self._batches[0]
        batch.begun = True
        batch.frames -= 1
        if batch.frames == 0:
            self._batches.popleft()

    def _due(self) -> float:
        batch, *others = self._batches
        step = FASTEST * self.interval
        if batch.begun and not others:
            even = (batch.until - self._left) / (batch.frames + 1)  # at most the interval
            step = max(even, step)
        return self._left + step
