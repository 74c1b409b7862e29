"""What a session needs to go on after its connection or its front is gone.

A plain object; on Ray it lives in an actor of its own, outside every front. One front at a time
holds a session: whoever claims it last. What an earlier holder still writes is refused.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from serve.wire.protocol import Format, WireError
from serve.wire.work import Opening, Ready

MAX_TAIL = 8 * 2**20  # bytes of edited frames kept for a client that did not get them
MIN_TAIL_FRAMES = 48  # of which so many are kept, whatever their size
HOLDER_BEAT_S = 10.0  # a front says this often which sessions it holds


@dataclass(frozen=True)
class Entry:
    """What goes to the client: a frame (bytes) or a control message (str).

    `position` counts the edited frames before it, over the whole session.
    """

    position: int
    data: bytes | str


@dataclass(frozen=True)
class Progress:
    """Where a session stands after a chunk.

    `next_frame` is the source frame to send next, `edited` the number of edited frames.
    """

    next_frame: int
    edited: int
    prompt: str  # the newest
    applied_prompt: str  # of the last delivered chunk
    state: bytes | None
    finished: str | None = None  # the reason of `closed`, once it is over


@dataclass(frozen=True)
class Header:
    """What stays the same for a whole session."""

    opening: Opening  # as first asked for, without state
    format: Format
    ready: Ready


@dataclass
class Record:
    header: Header
    progress: Progress
    epoch: int = 0
    held: bool = True
    seen: float = 0.0
    tail: deque[Entry] = field(default_factory=deque)
    tail_bytes: int = 0

    @property
    def tail_start(self) -> int:
        """Edited frames before this one are no longer kept."""
        return self.tail[0].position if self.tail else self.progress.edited


class SessionStore:
    """Records by resume token. `resume_s` is how long one outlives its connection."""

    def __init__(
        self, resume_s: float = 60.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.resume_s = resume_s
        self._clock = clock
        self._records: dict[str, Record] = {}

    def __len__(self) -> int:
        self._sweep()
        return len(self._records)

    def create(self, header: Header) -> str:
        """A new record, held by the caller with epoch 0; returns its token."""
        self._sweep()
        token = secrets.token_urlsafe(24)
        self._records[token] = self._record(header, 0)
        return token

    def claim(self, token: str, received: int) -> Record:
        """The record, now held by the caller, with the tail cut to what the client lacks.

        Raises WireError `bad_request` for a token that is unknown or expired, and for frames that
        are no longer kept.
        """
        self._sweep()
        record = self._records.get(token)
        if record is None:
            raise WireError(
                "bad_request",
                f"this resume token is unknown or older than {self.resume_s:g} s; open a new "
                "session without it",
            )
        if not record.tail_start <= received <= record.progress.edited:
            raise WireError(
                "bad_request",
                f"open.received is {received}, and this session can go on from {record.tail_start} "
                f"to {record.progress.edited} edited frames; open a new session",
            )
        record.epoch += 1
        record.held, record.seen = True, self._clock()
        missing = deque(entry for entry in record.tail if entry.position >= received)
        return replace(record, tail=missing)

    def commit(
        self, token: str, epoch: int, header: Header, progress: Progress, entries: list[Entry]
    ) -> bool:
        """After a chunk, before its `entries` go out. False: another front holds the session.

        A record that is not there (the store was started anew) is made again.
        """
        record = self._records.get(token)
        if record is None:
            record = self._records[token] = self._record(header, epoch)
        if record.epoch != epoch:
            return False
        record.progress, record.seen = progress, self._clock()
        record.tail.extend(entries)
        record.tail_bytes += sum(len(entry.data) for entry in entries)
        oldest_needed = progress.edited - MIN_TAIL_FRAMES
        while record.tail_bytes > MAX_TAIL and record.tail[0].position < oldest_needed:
            record.tail_bytes -= len(record.tail.popleft().data)
        return True

    def beat(self, held: list[tuple[str, int]]) -> list[str]:
        """A front's sign of life for the sessions it holds; returns those it lost."""
        lost = []
        for token, epoch in held:
            record = self._records.get(token)
            if record is not None and record.epoch != epoch:
                lost.append(token)
            elif record is not None:
                record.seen = self._clock()
        self._sweep()
        return lost

    def release(self, token: str, epoch: int, *, forget: bool = False) -> None:
        """The connection is gone: the time to resume runs from now, or is over."""
        record = self._records.get(token)
        if record is None or record.epoch != epoch:
            return
        if forget:
            del self._records[token]
        else:
            record.held, record.seen = False, self._clock()

    def _record(self, header: Header, epoch: int) -> Record:
        prompt = header.opening.prompt
        return Record(header, Progress(0, 0, prompt, prompt, None), epoch, seen=self._clock())

    def _sweep(self) -> None:
        now = self._clock()
        for token, record in list(self._records.items()):
            # A holder that died was seen up to one beat before: its client gets its time too.
            patience = self.resume_s + (2 * HOLDER_BEAT_S if record.held else 0)
            if now - record.seen > patience:
                del self._records[token]


class Store(Protocol):
    """How a front reaches the session store, wherever it is. Raises what `SessionStore` raises."""

    async def create(self, header: Header) -> str: ...

    async def claim(self, token: str, received: int) -> Record: ...

    async def commit(
        self, token: str, epoch: int, header: Header, progress: Progress, entries: list[Entry]
    ) -> bool: ...

    async def beat(self, held: list[tuple[str, int]]) -> list[str]: ...

    async def release(self, token: str, epoch: int, *, forget: bool = False) -> None: ...


class LocalStore:
    """A store in this process: sessions outlive their connections, not the process."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store

    async def create(self, header: Header) -> str:
        return self.store.create(header)

    async def claim(self, token: str, received: int) -> Record:
        return self.store.claim(token, received)

    async def commit(
        self, token: str, epoch: int, header: Header, progress: Progress, entries: list[Entry]
    ) -> bool:
        return self.store.commit(token, epoch, header, progress, entries)

    async def beat(self, held: list[tuple[str, int]]) -> list[str]:
        return self.store.beat(held)

    async def release(self, token: str, epoch: int, *, forget: bool = False) -> None:
        self.store.release(token, epoch, forget=forget)
