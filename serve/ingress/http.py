"""HTTP as the ingress takes it: a request's head has a size and a time, its body an end.

uvicorn itself reads a head of any length for as long as it takes, a trailer likewise, and what
still comes of a body after its answer: one client with one header of 300 MB held every other one
up. While an answer runs nothing is timed here: that is the application's matter.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.ingress.unread import Unread
from serve.limits import Limits

MAX_HEAD = 64 * 1024  # bytes of a request line and all headers, or of a trailer
HEAD_S = 10.0  # for a head to come, TLS apart
# Many clients write a whole upload before they read that it was refused: as much is thrown away.
MAX_UNASKED = Limits.max_upload  # bytes of a body that come after its answer was given
UNASKED_S = 30.0  # for them to come


class BoundedHttp(HttpToolsProtocol):
    _in_head = True  # or between requests; False within a body
    _bare = 0  # bytes since a head, a piece of a body or a request came to its end
    _progress = False  # one of these did, in what is being read
    _unasked = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread = Unread(self.loop, transport, self._still)
        self._wait(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._unread.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._progress = False
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return  # refused, or a WebSocket's from here on
        # Of what holds the end of something as well nobody can say how much is the next one's.
        self._bare = 0 if self._progress else self._bare + len(data)
        if self._bare > MAX_HEAD:
            self.send_400_response(f"A request's head or trailer has at most {MAX_HEAD} bytes.")
        elif self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            # uvicorn's own time for a connection that is kept ends with the first byte.
            self._wait(HEAD_S if self._in_head else UNASKED_S)

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if self.pipeline or (cycle and cycle.response_started and not cycle.response_complete):
            self.transport.abort()  # it would be taken for a part of the answer that is running
        else:
            super().send_400_response(msg)

    def on_headers_complete(self) -> None:
        self._in_head, self._unasked, self._progress = False, 0, True
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._progress = True
        if self.cycle is not None and self.cycle.response_complete:
            self._unasked += len(body)
            if self._unasked > MAX_UNASKED:
                self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._progress = True, True
        self._stop_waiting()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._unread.stop()  # the WebSocket looks itself
        super().handle_websocket_upgrade()

    def resume_writing(self) -> None:
        self._unread.was_read()
        super().resume_writing()

    def _still(self) -> bool:
        said = self.cycle is None or self.cycle.response_complete
        return said or self.flow.write_paused or self.transport.is_closing()

    def _wait(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
