"""One client's stream, seen from the front: a plain asyncio object without sockets or Ray.

    source frames -> `feed` -> waiting -> `take` -> started -> `deliver` -> entries for the client

A frame waits until the editor takes it, with its chunk or ahead of it; from then until the edited
chunk is delivered it is started, and kept so that another editor can be given it again. Frame
indices are the source's everywhere; in live mode the indices of dropped frames are missing from
what comes back.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from serve.admission.rungs import FULL
from serve.delivery.drops import Drops
from serve.hub.records import Entry, Progress
from serve.wire.codec import MAX_INDEX, Frame
from serve.wire.protocol import (
    Chunk,
    Dropped,
    Mask,
    PromptApplied,
    QualityApplied,
    WireError,
    to_json,
)
from serve.wire.work import Edited, Opening, Ready, Work

LOSSLESS_CHUNKS = 2.0  # source chunks that may wait before the socket is no longer read
LIVE_CHUNKS = 1.5  # beyond these the oldest frames are dropped; half a chunk is for jitter
AHEAD = 4  # frames of an incomplete chunk that are worth a work: what the VAE makes one latent of
UNSENT_CHUNKS = 2  # edited chunks that may wait for the client before no more work is given out


class State(Enum):
    NEW = "new"  # no editor yet
    STREAMING = "streaming"
    FINISHING = "finishing"  # the client closed: what came in is edited to its end
    RECOVERING = "recovering"  # the editor is gone, another one is looked for
    CLOSED = "closed"


LEGAL: dict[State, set[State]] = {
    State.NEW: {State.STREAMING, State.CLOSED},
    State.STREAMING: {State.FINISHING, State.RECOVERING, State.CLOSED},
    State.FINISHING: {State.RECOVERING, State.CLOSED},
    State.RECOVERING: {State.STREAMING, State.FINISHING, State.CLOSED},
    State.CLOSED: set(),
}


class IllegalTransitionError(RuntimeError):
    """A defect of ours: a session was told what its state does not allow."""


@dataclass(frozen=True)
class SourceFrame:
    index: int
    time_us: int
    pixels: np.ndarray  # uint8 [height, width, 3]
    arrived: float  # time.monotonic()
    prompt: str  # the newest when it came


@dataclass(frozen=True)
class Started:
    """A chunk that an editor has, or the first frames of one."""

    works: list[Work]
    frames: list[SourceFrame]

    @property
    def complete(self) -> bool:
        return not self.works[-1].more


@dataclass(frozen=True)
class Delivery:
    """An edited chunk with the source frames it was made of."""

    edited: Edited
    prompt: str
    frames: list[SourceFrame]
    settled: int  # `Session.settled` right after it
    last: bool
    latency_s: float  # since the last source frame arrived
    model: str  # the version that made it
    given: float  # time.monotonic(): its last work to an editor, for the first time
    answered: float  # and its edit here


class Session:
    """Of the stream that `opening` opens; a resumed one goes on from `progress`."""

    def __init__(self, opening: Opening, progress: Progress | None = None) -> None:
        progress = progress or Progress.start(opening.prompt)
        self.opening, self.name = opening, opening.session
        self.state = State.NEW
        self.prompt = progress.prompt  # the newest: from the next chunk on
        self.next_frame = progress.next_frame  # source frame that has to come next
        self.edited = progress.edited  # frames delivered and encoded
        self.unsent = 0  # frames delivered that the client has not taken yet
        self.drops = Drops(progress.dropped)
        self.applied_prompt = progress.applied_prompt  # of the last chunk that went to the client
        self.quality = progress.quality  # likewise: its rung, and the working size of a lower one
        self._shape = (opening.height, opening.width, 3)
        self._live = opening.mode == "live"
        self._closing = False
        self._waiting: deque[SourceFrame] = deque()
        self._started: deque[Started] = deque()
        self._again: deque[Work] = deque()
        self._sizes: tuple[int, int] | None = None  # frames of the first and of any other chunk
        self._given: deque[float] = deque()  # when each started chunk was complete at an editor
        self._taken = 0  # chunks, over the whole session
        self._last_taken = False
        self._waiters: list[asyncio.Future[None]] = []
        self._model = ""  # the version that edits it

    def to(self, state: State) -> None:
        if state not in LEGAL[self.state]:
            raise IllegalTransitionError(
                f"session {self.name} cannot go from {self.state.value} to {state.value}"
            )
        self.state = state
        self._notify()

    @property
    def accepts_frames(self) -> bool:
        return not self._closing and self.state is not State.CLOSED

    @property
    def idle(self) -> bool:
        """Nothing of it is being edited, so only the client can make it go on."""
        editing = any(chunk.complete for chunk in self._started)
        return not editing and not self._closing and self.unsent == 0

    @property
    def working(self) -> bool:
        """An editor has work of it that it has not answered."""
        return bool(self._started)

    @property
    def settled(self) -> int:
        """Source frames before this one are edited and delivered, or dropped."""
        for chunk in self._started:
            if chunk.frames:
                return chunk.frames[0].index
        return self._waiting[0].index if self._waiting else self.next_frame

    @property
    def chunk_frames(self) -> int:
        # Before an editor has answered nothing says how long a chunk is; the wait is short.
        return self._sizes[1] if self._sizes else 12

    # --- the client's side

    async def room(self) -> None:
        """Returns when another source frame may come; at once in live mode, which drops instead."""
        if not self._live:
            await self._until(lambda: len(self._waiting) < self._limit(LOSSLESS_CHUNKS))

    def feed(self, index: int, time_us: int, pixels: np.ndarray) -> list[Entry]:
        """The next source frame, uint8 [height, width, 3]. Raises WireError.

        Returns `dropped` messages when the client should hear of drops before its next chunk. A
        frame that it was told of as dropped before it came back stays dropped.
        """
        if not self.accepts_frames:
            raise WireError("bad_request", f"frame {index} came after close")
        if index != self.next_frame:
            raise WireError("bad_frame", f"frame {self.next_frame} must come next, got {index}")
        if index >= MAX_INDEX:
            raise WireError("bad_request", "frame indices are used up; open a new session")
        assert pixels.shape == self._shape
        if self.drops.known(index):
            self.next_frame += 1
            return []
        self._waiting.append(SourceFrame(index, time_us, pixels, time.monotonic(), self.prompt))
        self.next_frame += 1
        self._notify()
        if self._live and len(self._waiting) > self._limit(LIVE_CHUNKS):
            self.drops.add(self._waiting.popleft().index)
        return self._tell_drops() if self.drops.untold >= self._limit(1) else []

    def set_prompt(self, prompt: str) -> None:
        if not self.accepts_frames:
            raise WireError("bad_request", "a prompt came after close")
        self.prompt = prompt

    def finish(self) -> None:
        """The client has sent its last frame: edit what is there."""
        if self._closing:
            raise WireError("bad_request", "close came twice")
        self._closing = True
        if self.state is State.STREAMING:
            self.to(State.FINISHING)

    def sent(self, frames: int = 1) -> None:
        """The client took edited frames."""
        self.unsent -= frames
        self._notify()

    # --- the editor's side

    def opened(self, ready: Ready) -> None:
        """An editor has the stream, for the first time or again."""
        self._model = ready.model
        if self._sizes is None:
            self._sizes = (ready.first_chunk_frames, ready.chunk_frames)
            self._taken = ready.chunks
        self.to(State.FINISHING if self._closing else State.STREAMING)

    def lost(self, ahead: int = 0) -> None:
        """The editor is gone: what it had not answered is given out again, but for the first
        `ahead` frames, which are in the state that it left.
        """
        self.to(State.RECOVERING)
        self._again = deque(work for chunk in self._started for work in chunk.works)
        while ahead > 0:
            ahead -= len(self._again.popleft().frames)
        assert ahead == 0, "an editor left with a part of a work"

    async def take(self) -> Work:
        """The next chunk, when it is complete and the client keeps up with what it gets, or before
        that `AHEAD` frames of it.
        """
        if self._again:
            return self._again.popleft()
        assert not self._last_taken, "work was asked for after the last"
        await self._until(self._has_work)
        missing = self._missing
        if self._live and not self._closing and self._full:
            # Behind: the newest frames are edited, so that the delay does not stay.
            while len(self._waiting) > missing:
                self.drops.add(self._waiting.popleft().index)
        whole = self._closing or len(self._waiting) >= missing
        size = min(missing, len(self._waiting)) if whole else AHEAD
        frames = [self._waiting.popleft() for _ in range(size)]
        self._last_taken = last = self._closing and not self._waiting
        pixels = [frame.pixels for frame in frames]
        begun = self._begun
        chunk = [*begun.frames, *frames] if begun else frames
        work = Work(
            number=self._taken,
            # By arrival, so that a lossless session is the same however fast it is edited.
            prompt=chunk[-1].prompt if chunk else self.prompt,
            frames=np.stack(pixels) if pixels else np.empty((0, *self._shape), np.uint8),
            last=last,
            more=not whole,
        )
        if begun:
            begun.works.append(work)
            begun.frames.extend(frames)
        else:
            self._started.append(Started([work], frames))
        self._taken += whole
        if whole:
            self._given.append(time.monotonic())
        self._notify()
        return work

    def deliver(self, edited: Edited) -> Delivery:
        """The editor's answer to the oldest started work; from here on it is never done again."""
        chunk = self._started.popleft()
        work, frames = chunk.works[-1], chunk.frames
        assert edited.number == work.number, (edited.number, work.number)
        self.unsent += len(frames)
        now = time.monotonic()
        return Delivery(
            edited, work.prompt, frames, self.settled, work.last,
            latency_s=now - frames[-1].arrived if frames else 0.0,
            given=self._given.popleft(), answered=now, model=self._model,
        )  # fmt: skip

    def entries(self, delivery: Delivery, images: list[bytes]) -> list[Entry]:
        """What goes to the client for a delivery, once its frames are encoded to `images`."""
        entries = self._tell_drops()
        frames = delivery.frames
        if frames and self.opening.mask and delivery.edited.mask is not None:
            entries.append(Entry(self.edited, to_json(_mask(delivery.edited))))
        if frames and delivery.prompt != self.applied_prompt:
            self.applied_prompt = delivery.prompt
            applied = PromptApplied(
                delivery.prompt, frames[0].index, delivery.edited.unknown or None
            )
            entries.append(Entry(self.edited, to_json(applied)))
        if frames and (quality := self._new_quality(delivery)):
            entries.append(Entry(self.edited, to_json(quality)))
        for frame, image in zip(frames, images, strict=True):
            entries.append(Entry(self.edited, Frame(frame.index, frame.time_us, image).to_bytes()))
            self.edited += 1
        if frames:
            entries.append(Entry(self.edited, to_json(_report(delivery))))
        return entries

    # --- inside

    def _new_quality(self, delivery: Delivery) -> QualityApplied | None:
        """Where the delivery is edited otherwise than the one before."""
        edited, told = delivery.edited, self.quality
        lower = edited.rung != FULL
        self.quality = f"{edited.rung} {edited.work_size}" if lower else FULL
        if self.quality == told:
            return None
        return QualityApplied(edited.rung, delivery.frames[0].index, edited.work_size, edited.steps)

    @property
    def _begun(self) -> Started | None:
        """The chunk of which an editor has only the first frames."""
        return self._started[-1] if self._started and not self._started[-1].complete else None

    @property
    def _missing(self) -> int:
        """Frames that no editor has yet of the next chunk that is not complete."""
        assert self._sizes is not None
        begun = self._begun
        return self._sizes[0 if self._taken == 0 else 1] - (len(begun.frames) if begun else 0)

    @property
    def _full(self) -> bool:
        return len(self._waiting) >= self._limit(LIVE_CHUNKS)

    def _has_work(self) -> bool:
        if self._sizes is None or self.unsent >= UNSENT_CHUNKS * self.chunk_frames:
            return False
        return self._closing or len(self._waiting) >= min(AHEAD, self._missing)

    def _limit(self, chunks: float) -> int:
        return round(chunks * self.chunk_frames)

    def _tell_drops(self) -> list[Entry]:
        told = self.drops.tell()
        return [Entry(self.edited, to_json(Dropped(first, count))) for first, count in told]

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _notify(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _report(delivery: Delivery) -> Chunk:
    edited, frames = delivery.edited, delivery.frames
    return Chunk(
        index=edited.index,
        first_frame=frames[0].index,
        frames=len(frames),
        latency_ms=round(delivery.latency_s * 1000, 2),
        compute_ms=round(edited.compute_ms, 2),
        recomputed=round(edited.recomputed, 4),
        steps=edited.steps,
    )


def _mask(edited: Edited) -> Mask:
    assert edited.mask is not None
    latents, rows, columns = edited.mask.shape
    bits = base64.b64encode(np.packbits(edited.mask).tobytes()).decode()
    return Mask(edited.index, latents, rows, columns, bits)
