"""From edited entries to the socket: in order, and in live mode at the source's frame rate."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from serve.protocol import Mode
from serve.session import Entry

CATCH_UP = 0.75  # of the frame interval, while more than a chunk waits


class Outbox:
    """Entries that wait for the client.

    Live entries leave one frame interval apart. A late chunk makes all after it late; the time is
    won back by a shorter interval as long as more than `chunk_frames` wait.
    """

    def __init__(self, *, mode: Mode, fps: float, chunk_frames: int) -> None:
        self.interval = 1 / fps if mode == "live" else 0.0
        self.chunk_frames = chunk_frames
        self.progress = time.monotonic()  # when the client last took something, or had nothing
        self._entries: deque[Entry] = deque()
        self._more = asyncio.Event()
        self._ended = False
        self._due = 0.0

    def put(self, entries: list[Entry]) -> None:
        if entries and not self._entries:
            self.progress = time.monotonic()
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
            if frame and self.interval:
                await self._pace()
            await send(entry.data)
            self._entries.popleft()
            self.progress = time.monotonic()
            if frame:
                sent()

    async def _pace(self) -> None:
        now = time.monotonic()
        behind = len(self._entries) > self.chunk_frames + 1
        if self._due > now:
            await asyncio.sleep(self._due - now)
        self._due = max(self._due, now) + self.interval * (CATCH_UP if behind else 1.0)
