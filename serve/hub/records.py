"""What a session needs to go on after its connection or its front is gone.

A plain object; on Ray it lives in an actor of its own, outside every front. One front at a time
holds a session: whoever claims it last. What an earlier holder still writes is refused.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from heapq import heapify, heapreplace, nlargest

from serve.admission.rungs import FULL
from serve.limits import Limits
from serve.wire.protocol import RETRY_AFTER_S, Detail, Format, Mode, WireError
from serve.wire.split_state import HistoryPart, SplitState
from serve.wire.work import Opening, Ready

MAX_TAIL = 8 * 2**20  # bytes of edited frames kept for a client that did not get them
MIN_TAIL_FRAMES = 48  # of which so many are kept, whatever their size, while there is room
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
    state: SplitState | None
    finished: bool = False  # `closed` is among what went to the client
    dropped: tuple[tuple[int, int], ...] = ()  # from `next_frame` on, told of: first and count
    quality: str = FULL  # as `Session` says it, of the last delivered chunk

    @classmethod
    def start(cls, prompt: str) -> Progress:
        return cls(0, 0, prompt, prompt, None)


@dataclass(frozen=True)
class Shape:
    """What an open that resumes a session must say as the first one did; None where it may be
    silent and is."""

    width: int
    height: int
    mode: Mode
    format: Format
    work_size: str | None = None
    detail: Detail | None = None
    tenant: str = ""
    model: str | None = None  # by name


@dataclass(frozen=True)
class Header:
    """What stays the same for a whole session."""

    opening: Opening  # as first asked for, without state
    format: Format
    ready: Ready

    def check_shape(self, now: Shape) -> None:
        """Raises WireError `bad_request`, naming what is another."""
        first = self.opening
        before = Shape(
            first.width, first.height, first.mode, self.format, first.work_size, first.detail,
            first.tenant, first.model,
        )  # fmt: skip
        for name, value in asdict(now).items():
            if value is not None and value != getattr(before, name):
                raise WireError(
                    "bad_request",
                    f"the session to resume has {name} {getattr(before, name)!r}, open says "
                    f"{value!r}",
                )


@dataclass(frozen=True)
class Commit:
    """What a front makes safe after a chunk, before its `entries` go out.

    One that may be said twice, because its answer was lost, has a `number`, higher than those
    before it.
    """

    token: str
    epoch: int
    header: Header
    progress: Progress
    entries: list[Entry]
    number: int = 0


@dataclass
class Record:
    header: Header
    progress: Progress
    epoch: int
    seen: float
    held: bool = True
    tail: deque[Entry] = field(default_factory=deque)
    tail_bytes: int = 0
    number: int = 0  # of the holder's last commit

    @property
    def size(self) -> int:
        return self.tail_bytes + (self.progress.state.size if self.progress.state else 0)

    @property
    def tenant(self) -> str:
        return self.header.opening.tenant

    def drop_oldest(self) -> int:
        """Forgets the tail's first entry; returns its bytes."""
        size = len(self.tail.popleft().data)
        self.tail_bytes -= size
        return size

    @property
    def tail_start(self) -> int:
        """Edited frames before this one are no longer kept."""
        return self.tail[0].position if self.tail else self.progress.edited


# What a commit is made of.
COMMIT_KINDS = (Commit, Header, Opening, Ready, Progress, Entry, SplitState, HistoryPart)


def new_token() -> str:
    """What a client comes back with."""
    return secrets.token_urlsafe(24)


class SessionStore:
    """Records by resume token. `resume_s` is how long one outlives its connection.

    Its methods are async because a front calls them wherever the store is (`hub.HubClient`).
    """

    def __init__(
        self,
        resume_s: float = Limits.resume_s,
        *,
        max_bytes: float = math.inf,
        gather_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_bytes`: of all records. `gather_s`: from now on, for fronts to say what they hold,
        see `remote.RemoteRecords`."""
        self.resume_s, self.max_bytes = resume_s, max_bytes
        self._gathered = clock() + gather_s
        self.bytes = 0  # of states and tails
        self._clock = clock
        self._of_tenants = Counter[str]()  # of `bytes`
        self._records: dict[str, Record] = {}

    def __len__(self) -> int:
        self._sweep()
        return len(self._records)

    async def create(self, header: Header) -> str:
        """A new record, held by the caller with epoch 0; returns its token."""
        self._sweep()
        token = new_token()
        self._records[token] = self._record(header, 0)
        return token

    async def claim(self, token: str, received: int, shape: Shape | None = None) -> Record:
        """The record, now held by the caller, with the tail cut to what the client lacks.

        Raises WireError `bad_request` for a token that is unknown or expired, for another `shape`
        than the session's, and for frames that are no longer kept; `at_capacity` while a store that
        was started anew may still hear of it. Who holds it goes on then.
        """
        self._sweep()
        record = self._records.get(token)
        if record is None and self._clock() < self._gathered:
            message = "the server's records are being gathered; come back with your resume token"
            raise WireError("at_capacity", message, RETRY_AFTER_S)
        # Another tenant's session is not told from one that never was.
        if record is None or (shape and shape.tenant != record.header.opening.tenant):
            raise WireError(
                "bad_request",
                f"this resume token is unknown or older than {self.resume_s:g} s; open a new "
                "session without it",
            )
        if shape is not None:
            record.header.check_shape(shape)
        if not record.tail_start <= received <= record.progress.edited:
            raise WireError(
                "bad_request",
                f"open.received is {received}, and this session can go on from {record.tail_start} "
                f"to {record.progress.edited} edited frames; open a new session",
            )
        record.epoch += 1
        record.number = 0
        record.held, record.seen = True, self._clock()
        missing = deque(entry for entry in record.tail if entry.position >= received)
        return replace(record, tail=missing)

    async def commit(self, commit: Commit) -> bool:
        """False: another front holds the session.

        A record that is not there (the store was started anew) is made again, and a holder whose
        claim only an earlier store knew is believed. Of a state may be left out what the one before
        holds; raises LostPartError, and nothing has changed, where that is not here.
        """
        record = self._records.get(commit.token)
        if record is not None and commit.epoch < record.epoch:
            return False
        if (
            record is not None
            and commit.epoch == record.epoch
            and 0 < commit.number <= record.number
        ):
            return True
        progress = commit.progress
        if progress.state is not None:
            state = progress.state.completed(record.progress.state if record else None)
            progress = replace(progress, state=state)
        if record is None:
            record = self._records[commit.token] = self._record(commit.header, commit.epoch)
        record.epoch, record.number = commit.epoch, commit.number
        before = record.size
        first = commit.entries[0].position if commit.entries else commit.progress.edited
        if first > record.progress.edited:
            record.tail.clear()  # what came between was never said here: nobody may resume before
            record.tail_bytes = 0
        record.progress, record.seen = progress, self._clock()
        record.tail.extend(commit.entries)
        record.tail_bytes += sum(len(entry.data) for entry in commit.entries)
        oldest_needed = commit.progress.edited - MIN_TAIL_FRAMES
        while record.tail_bytes > MAX_TAIL and record.tail[0].position < oldest_needed:
            record.drop_oldest()
        self._count(record, record.size - before)
        self._make_room()
        return True

    async def beat(self, held: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """A front's sign of life for the tokens and epochs it holds; returns those it lost.

        It may hold the same session twice for a while: on a client's old socket and on its new one.
        """
        lost = []
        for token, epoch in held:
            record = self._records.get(token)
            if record is not None and record.epoch != epoch:
                lost.append((token, epoch))
            elif record is not None:
                record.seen = self._clock()
        self._sweep()
        return lost

    async def release(self, token: str, epoch: int, *, forget: bool = False) -> None:
        """The connection is gone: the time to resume runs from now, or is over."""
        record = self._records.get(token)
        if record is None or record.epoch != epoch:
            return
        if forget:
            self._forget(token)
        else:
            record.held, record.seen = False, self._clock()

    def _record(self, header: Header, epoch: int) -> Record:
        progress = Progress.start(header.opening.prompt)
        return Record(header, progress, epoch, self._clock())

    def _sweep(self) -> None:
        now = self._clock()
        for token, record in list(self._records.items()):
            # A holder that died was seen up to one beat before: its client gets its time too.
            patience = self.resume_s + (2 * HOLDER_BEAT_S if record.held else 0)
            if now - record.seen > patience:
                self._forget(token)

    def _forget(self, token: str) -> None:
        record = self._records.pop(token)
        self._count(record, -record.size)
        if not self._of_tenants[record.tenant]:
            del self._of_tenants[record.tenant]

    def _count(self, record: Record, size: int) -> None:
        self.bytes += size
        self._of_tenants[record.tenant] += size

    def _make_room(self) -> None:
        """Below `max_bytes`, at the cost of the tenant that has most: first its longest tails are
        cut, so that who is far behind may not resume, then its sessions go that were left longest
        ago, then those that are held."""
        while self.bytes > self.max_bytes:
            greatest, *others = nlargest(2, self._of_tenants, key=self._of_tenants.__getitem__)
            records = {t: r for t, r in self._records.items() if r.tenant == greatest}
            if any(record.tail_bytes for record in records.values()):
                next_most = self._of_tenants[others[0]] if others else 0
                self._cut_longest(records, next_most)
            else:
                self._forget(min(records, key=lambda t: (records[t].held, records[t].seen)))

    def _cut_longest(self, records: dict[str, Record], next_most: int) -> None:
        """Of one tenant's, until there is room, another tenant has more, or no tail is left."""
        longest = [(-record.tail_bytes, token) for token, record in records.items()]
        heapify(longest)
        while self.bytes > self.max_bytes and longest[0][0]:
            record = records[longest[0][1]]
            self._count(record, -record.drop_oldest())
            heapreplace(longest, (-record.tail_bytes, longest[0][1]))
            if self._of_tenants[record.tenant] < next_most:
                return
