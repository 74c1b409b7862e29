"""HTTP as the ingress takes it: a request's head has a size and a time, its body an end.

uvicorn itself reads a head of any length for as long as it takes, and what still comes of a body
after its answer: one client with one header of 300 MB held every other one up.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024  # bytes of a request line and all headers
HEAD_S = 10.0  # for them to come, TLS apart
MAX_UNASKED = 16 * 2**20  # bytes of a body that are thrown away after its answer was given


class BoundedHttp(HttpToolsProtocol):
    _head: int | None = 0  # bytes of a head that is not complete; None within a body
    _completed = False  # a head, in what is being read
    _unasked = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._head is not None and self._deadline is None:
            self._wait_for_head()
        within, self._completed = self._head is not None, False
        super().data_received(data)
        # Of what holds the end of a request as well nobody can say how much is the next one's head.
        if within and not self._completed and self._head is not None:
            self._head += len(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response(f"A request's head has at most {MAX_HEAD} bytes.")

    def on_message_begin(self) -> None:
        self._head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head, self._unasked, self._completed = None, 0, True
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None and self.cycle.response_complete:
            self._unasked += len(body)
            if self._unasked > MAX_UNASKED:
                self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head = 0
        super().on_message_complete()

    def _wait_for_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
