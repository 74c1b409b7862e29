"""WebSockets as the ingress takes them: bounded in the size of a message and in what is no message.

A message is in memory before anybody can refuse it, and sessions differ in size by a factor of
hundreds, so the largest is set while the socket is open. Pings and the pieces of a message cost
time here and are seen by nobody else: two clients that sent nothing else stopped every stream.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets import http11
from websockets.frames import Frame

from serve.front.socket import RESIZE
from serve.ingress.http import MAX_HEAD
from serve.ingress.unread import Unread

# A head that HTTP takes opens a WebSocket, too: by websockets' own limits, 8 KiB a line and 128
# lines, a browser with many cookies got the page, and its streams never opened.
http11.MAX_LINE_LENGTH = http11.MAX_NUM_HEADERS = MAX_HEAD

PIECE = 16 * 1024  # bytes that are parsed before it is looked at whether to go on
MAX_FRAGMENTS = 1024  # of one message; usual clients send whole ones or pieces of many kilobytes
MAX_CONTROL = 100  # pings and pongs within `CONTROL_S`; usual clients send one in 20 s
CONTROL_S = 1.0
VIOLATION = 1008  # close code
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class BoundedSocket(WebSocketsSansIOProtocol):
    _control = 0
    _counted_from = float("-inf")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread = Unread(self.loop, transport, transport.is_closing)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unread.stop()
        super().connection_lost(exc)

    async def run_asgi(self) -> None:
        self.scope["extensions"][RESIZE] = self._resize  # type: ignore[assignment]
        await super().run_asgi()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + PIECE])
            if self.conn.handshake_exc is not None and not self.handshake_initiated:
                self._reject()

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MAX_FRAGMENTS:
            self._refuse(f"a message in more than {MAX_FRAGMENTS} pieces")
        elif not self.transport.is_closing():
            super().handle_cont(event)

    def handle_ping(self) -> None:
        if not self._counts_as_control():
            return
        if self.writable.is_set():
            super().handle_ping()
        else:  # a client that does not read gets no pongs: they would pile up here
            self.conn.data_to_send()

    def handle_pong(self, event: Frame) -> None:
        if self._counts_as_control():
            super().handle_pong(event)

    def _counts_as_control(self) -> bool:
        """False when there were too many of late, and the connection is over."""
        now = self.loop.time()
        if now - self._counted_from > CONTROL_S:
            self._counted_from, self._control = now, 0
        self._control += 1
        if self._control == MAX_CONTROL + 1:
            self._refuse(f"more than {MAX_CONTROL} pings a second")
        return self._control <= MAX_CONTROL

    def _reject(self) -> None:
        """Answers a request that websockets takes for none; uvicorn would never do so."""
        answer = b"".join(self.conn.data_to_send())
        self.transport.write(answer or BAD_REQUEST)
        self.transport.close()

    def _refuse(self, reason: str) -> None:
        if self.transport.is_closing():
            return
        self.conn.data_to_send()  # pongs
        self.conn.fail(VIOLATION, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.writable.is_set():
            self.transport.close()
        else:
            self.transport.abort()  # it would wait until the client reads

    def _resize(self, size: int) -> None:
        self.conn.max_message_size = size
