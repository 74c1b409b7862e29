"""What is left for a client that does not read.

Who writes to it waits until it reads, and closing waits likewise, for ever where it reads nothing;
and a connection is a descriptor: who asks for large answers and reads none of them would take all
there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve.limits import Limits

UNREAD_S = Limits.stalled_reader_s  # between two looks


class Unread:
    """Ends a connection on which nothing was read from one look to the next, while `still` says
    that nobody can write to it: all is said, or who writes waits for the client."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        still: Callable[[], bool],
    ) -> None:
        self._loop, self._transport, self._still = loop, transport, still
        self._left = 0  # bytes at the last look, 0 where that says nothing
        self._timer = loop.call_later(UNREAD_S, self._look)

    def stop(self) -> None:
        self._timer.cancel()

    def was_read(self) -> None:
        """The client took something, whatever is left at the next look."""
        self._left = 0

    def _look(self) -> None:
        left = self._transport.get_write_buffer_size() if self._still() else 0
        if left and left == self._left:
            self._transport.abort()
            return
        self._left = left
        self._timer = self._loop.call_later(UNREAD_S, self._look)
