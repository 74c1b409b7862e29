"""A client's stream: what it sends, what comes back, and how it survives a lost connection.

Source frames are kept until their edit has come; after a lost connection the stream is opened again
with its resume token and they are sent again from where the server says, so that nothing is lost or
repeated. `serve.client` makes these.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_socket
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    InvalidURI,
)
from websockets.typing import Subprotocol

from infra.runtime.errors import UserError
from serve.wire import codec
from serve.wire.codec import Frame, parse_frame
from serve.wire.codes import CODES
from serve.wire.protocol import (
    PATH,
    SPENT,
    STOPPED,
    SUBPROTOCOL,
    Close,
    Closed,
    Error,
    Format,
    InQueue,
    Open,
    Opened,
    Prompt,
    ServerMessage,
    WireError,
    parse_server,
    to_json,
)

log = logging.getLogger(__name__)

RESUME_S = 60.0  # that a server keeps a session without its connection
FIRST_S = 20.0  # for a first connection that a server cut before it answered
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
IN_VAIN = 5  # resumed connections that brought nothing, after which the stream is given up
CUT_SHORT = {  # reasons of `closed` after which frames may be missing
    STOPPED: "the server was stopped",
    SPENT: "the minutes of your token are used up for today",
}
AHEAD_CHUNKS = 3  # lossless: chunks of source that may be on their way
MAX_MESSAGE = 32 * 2**20  # bytes
UNREAD = 64  # messages that wait for the caller before the socket is no longer read


class ConnectError(ConnectionError):
    """The server cannot be reached, or is no LiveEdit server."""


@dataclass(frozen=True)
class EditedFrame:
    index: int  # of the source frame
    time_us: int  # as it was sent
    image: bytes
    format: Format
    size: tuple[int, int]  # width, height
    came: float  # time.monotonic()

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3]"""
        return codec.decode(self.image, self.format, width=self.size[0], height=self.size[1])


Event = EditedFrame | ServerMessage


class Stream:
    """Made by `client.connect`. `send` and reading belong into two tasks: either can wait."""

    def __init__(
        self,
        url: str,
        message: Open,
        *,
        token: str | None = None,
        on_queue: Callable[[InQueue], None] | None = None,
    ) -> None:
        self.url = stream_url(url)
        self.prompt = message.prompt
        self.received = 0  # edited frames
        self.reconnects = 0
        self.opened: Opened | None = None
        self.closed: Closed | None = None
        self._message, self._token, self._on_queue = message, token, on_queue
        self._resume: str | None = None
        self._kept: deque[Frame] = deque()  # source frames whose edit has not come
        self._next = 0  # index of the next source frame
        self._last = -1  # index of the last edited frame
        self._prompts: deque[str] = deque()
        self._prompt_changed = self._finishing = False
        self._connected = asyncio.Event()
        self._changed = asyncio.Event()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue(UNREAD)
        self._failure: BaseException | None = None

    # --- for the caller

    async def send(self, pixels: np.ndarray, *, time_us: int | None = None) -> int | None:
        """The next source frame, uint8 [height, width, 3]; returns its index.

        Lossless: waits while enough is on its way. Live: a frame that comes while the connection is
        lost is left out (None), as a camera's frames are. Raises what ended the stream, and
        UserError for pixels of another kind or size than the stream was opened with.
        """
        shape = (self._message.height, self._message.width, 3)
        if pixels.dtype != np.uint8 or pixels.shape != shape:
            raise UserError(
                f"a frame of this stream is uint8 {list(shape)} (height, width, RGB), "
                f"got {pixels.dtype} {list(pixels.shape)}"
            )
        image = await asyncio.to_thread(codec.encode, pixels, self._message.format)
        return await self.send_encoded(image, time_us=time_us)

    async def send_encoded(self, image: bytes, *, time_us: int | None = None) -> int | None:
        """As `send`, for an image that is encoded in the session's format already."""
        if self._message.mode == "live" and not self._connected.is_set():
            self._raise_failure()
            return None
        assert self.opened is not None
        ahead = AHEAD_CHUNKS * self.opened.chunk_frames
        while self._message.mode == "lossless" and self._next - self._last > ahead:
            await self._change()
        self._raise_failure()
        if time_us is None:
            time_us = time.time_ns() // 1000
        index, self._next = self._next, self._next + 1
        self._kept.append(Frame(index, time_us, image))
        self._notify()
        return index

    def set_prompt(self, prompt: str) -> None:
        """Edit by another prompt, from the next chunk on."""
        self.prompt, self._prompt_changed = prompt, True
        self._prompts.append(prompt)
        self._notify()

    def finish(self) -> None:
        """No more frames come; reading ends when the last edited one was read."""
        self._finishing = True
        self._notify()

    async def events(self) -> AsyncIterator[Event]:
        """Edited frames and the server's messages, in order. Raises WireError, ConnectError."""
        while (event := await self._events.get()) is not None:
            yield event
        if self._failure:
            raise self._failure

    async def __aiter__(self) -> AsyncIterator[EditedFrame]:
        async for event in self.events():
            if isinstance(event, EditedFrame):
                yield event

    # --- inside

    async def run(self, opened: asyncio.Future[None]) -> None:
        """Keeps a connection until the stream is over; `opened` is told of the first."""
        lost_at, pause = time.monotonic(), FIRST_PAUSE_S
        in_vain, had = 0, 0
        try:
            while self.closed is None:
                failure: Exception
                try:
                    await self._connect_once(opened)
                except (ConnectionClosed, OSError, InvalidHandshake, TimeoutError) as error:
                    if self._resume is None and not _cut_by_a_server(error):
                        raise ConnectError(f"{self.url} cannot be reached: {error}") from error
                    failure = error
                except WireError as error:
                    fate = CODES[error.code]
                    if not (fate.resume if self._resume else fate.again):
                        raise
                    failure = error
                if self.closed is not None:
                    break
                if self._connected.is_set():
                    self._connected.clear()
                    lost_at, pause = time.monotonic(), FIRST_PAUSE_S
                    in_vain = 0 if self.received > had else in_vain + 1
                    had = self.received
                patience = RESUME_S if self._resume else FIRST_S
                if time.monotonic() - lost_at > patience or in_vain >= IN_VAIN:
                    if isinstance(failure, WireError):
                        raise failure
                    what = "the connection is lost" if self._resume else "cannot be reached"
                    raise ConnectError(f"{self.url} {what}: {failure}")
                log.info("connection lost (%s); trying again", failure)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            if self.closed is not None and self.closed.reason in CUT_SHORT:
                raise ConnectError(
                    f"{CUT_SHORT[self.closed.reason]}; {self.received} of {self._next} frames are "
                    "edited"
                )
        except (WireError, ConnectError, InvalidURI) as error:
            self._failure = error
            if not opened.done():
                opened.set_exception(error)
        finally:
            self._notify()
            await self._events.put(None)

    async def _connect_once(self, opened: asyncio.Future[None]) -> None:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else None
        async with connect_socket(
            self.url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=headers,
            compression=None,
            max_size=MAX_MESSAGE,
        ) as socket:
            await socket.send(to_json(self._open_message()))
            first = self._message_of(await socket.recv())
            while isinstance(first, InQueue):
                if self._on_queue is not None:
                    self._on_queue(first)
                first = self._message_of(await socket.recv())
            if not isinstance(first, Opened):
                raise WireError("bad_request", f"the server answered open with {first}")
            self.reconnects += self.opened is not None
            self.opened, self._resume = first, first.resume
            self._connected.set()
            if not opened.done():
                opened.set_result(None)
            sending = asyncio.create_task(self._send_all(socket, first.next_frame))
            try:
                async for data in socket:
                    await self._take(data)
                    if self.closed is not None:
                        return
                raise ConnectionResetError("the server closed without saying why")
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    def _open_message(self) -> Open:
        values = {name: getattr(self._message, name) for name in Open.__dataclass_fields__}
        if self._resume is not None:
            values |= {"resume": self._resume, "received": self.received}
        return Open(**values)

    async def _send_all(self, socket: ClientConnection, next_frame: int) -> None:
        """Everything from source frame `next_frame` on, in order."""
        self._prompts.clear()
        if self._prompt_changed:
            self._prompts.append(self.prompt)
        position = next_frame
        closed = False
        while True:
            while self._prompts:
                await socket.send(to_json(Prompt(self._prompts.popleft())))
            if position < self._next:
                frame = self._kept[position - self._kept[0].index]
                position += 1
                await socket.send(frame.to_bytes())
            elif self._finishing and not closed:
                closed = True
                await socket.send(to_json(Close()))
            else:
                await self._change()

    async def _take(self, data: str | bytes) -> None:
        if isinstance(data, str):
            message = self._message_of(data)
            if isinstance(message, Closed):
                self.closed = message
            if message is not None:
                await self._events.put(message)
            return
        frame = parse_frame(data)
        if frame.index <= self._last:
            raise WireError("internal", f"frame {frame.index} came after {self._last}")
        self._last = frame.index
        self.received += 1
        while self._kept and self._kept[0].index <= frame.index:
            self._kept.popleft()
        self._notify()
        size = (self._message.width, self._message.height)
        await self._events.put(
            EditedFrame(
                frame.index, frame.time_us, frame.image, self._message.format, size,
                time.monotonic(),
            )
        )  # fmt: skip

    def _message_of(self, data: str | bytes) -> ServerMessage | None:
        if isinstance(data, bytes):
            raise WireError("bad_request", "the server sent a frame before opened")
        message = parse_server(data)
        if isinstance(message, Error):
            raise WireError.of(message)
        return message

    async def _change(self) -> None:
        self._changed.clear()
        self._raise_failure()
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self.closed is not None:
            raise ConnectError(f"the server closed the stream: {self.closed.reason}")


def _cut_by_a_server(error: Exception) -> bool:
    """Whether somebody listens there who has not answered: a front that died or is starting.

    Nobody there, no such host and what is no LiveEdit server stay as they are.
    """
    if isinstance(error, InvalidStatus):
        return error.response.status_code >= 500
    if isinstance(error, InvalidMessage):
        return isinstance(error.__cause__, EOFError)
    return isinstance(error, ConnectionClosed | TimeoutError)


def stream_url(url: str) -> str:
    """The WebSocket address of a server's address."""
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.netloc:
        raise UserError(f"{url!r} is no server address; write ws://HOST:PORT")
    prefix = parts.path.rstrip("/").removesuffix(PATH)  # of a proxy in front of the server
    return urlunsplit((scheme, parts.netloc, prefix + PATH, parts.query, ""))
