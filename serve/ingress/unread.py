"""What is left for a client when our side of its connection is done.

Closing waits until the client has read that, for ever where it reads nothing, and a connection is a
descriptor: who asks for large answers and reads none of them would take all there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve.limits import Limits

UNREAD_S = Limits.stalled_reader_s / 2  # between two looks


class Unread:
    """Ends a connection on which nothing was read from one look to the next, once `done` says that
    nobody writes to it any more."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        done: Callable[[], bool],
    ) -> None:
        self._loop, self._transport, self._done = loop, transport, done
        self._left = 0  # bytes at the last look, 0 while somebody wrote
        self._timer = loop.call_later(UNREAD_S, self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left = self._transport.get_write_buffer_size() if self._done() else 0
        if left and left == self._left:
            self._transport.abort()
            return
        self._left = left
        self._timer = self._loop.call_later(UNREAD_S, self._look)
