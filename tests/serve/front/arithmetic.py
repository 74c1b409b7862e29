"""An editor that is arithmetic.

An edited frame shows its source frame's number, its prompt's number and a checksum of all frames
that were edited before its chunk, so that every lost, repeated or misplaced frame, and every state
that is not the right one, shows in the pictures.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import numpy as np

from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.split_state import HistoryPart, SplitState
from serve.wire.work import (
    Edited,
    EditorEvent,
    EditorLostError,
    Frames,
    Moved,
    Opening,
    Queued,
    Ready,
    Take,
    Work,
)

SIDE = 16  # pixels
FIRST, CHUNK = 9, 12
KEPT = 3  # chunks whose checksums are in a state


def picture(*channels: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), channels, np.uint8)


def source(index: int) -> np.ndarray:
    return picture(index % 256, index // 256, 77)


def edit(frame: np.ndarray, prompt: str, checksum: int) -> np.ndarray:
    return picture(frame[0, 0, 0], int(prompt.split()[-1]) % 256, checksum % 256)


@dataclass
class Known:
    """A stream; all of it is its state, of which the checksums after its last chunks are parts."""

    chunks: int
    checksums: list[int]
    pending: list[np.ndarray]
    there: tuple[str, ...] = ()  # parts that the front has

    @classmethod
    def restore(cls, state: SplitState | None) -> Known:
        if state is None:
            return cls(0, [], [])
        values = json.loads(state.rest)
        pending = [source(0) + np.uint8(0) for _ in values["pending"]]
        for frame, (red, green) in zip(pending, values["pending"], strict=True):
            frame[..., 0], frame[..., 1] = red, green
        data = {part.name: part.data for part in state.parts}
        checksums = [int(data[name]) for name in state.names]
        assert len(checksums) == min(values["chunks"], KEPT)
        return cls(values["chunks"], checksums, pending, state.names)

    def snapshot(self) -> SplitState:
        pending = [[int(v) for v in frame[0, 0, :2]] for frame in self.pending]
        rest = json.dumps({"chunks": self.chunks, "pending": pending}).encode()
        parts = tuple(HistoryPart.of(b"%d" % checksum) for checksum in self.checksums)
        state = SplitState(rest, tuple(part.name for part in parts), parts).beyond(self.there)
        self.there = state.names
        return state

    @property
    def checksum(self) -> int:
        """Of all frames that are edited."""
        return self.checksums[-1] if self.checksums else 0

    def push(self, work: Work) -> tuple[Frames, Edited] | None:
        self.pending += list(work.frames)
        if work.more:
            assert len(self.pending) < self.wanted
            return None
        assert len(self.pending) == self.wanted or work.last, "not a whole chunk"
        frames, self.pending = self.pending, []
        edited = [edit(frame, work.prompt, self.checksum) for frame in frames]
        checksum = self.checksum
        for frame in frames:
            checksum = zlib.crc32(frame.tobytes(), checksum)
        if frames:
            self.checksums = [*self.checksums, checksum][-KEPT:]
        index, self.chunks = self.chunks, self.chunks + bool(frames)
        made = np.stack(edited) if edited else np.empty((0, SIDE, SIDE, 3), np.uint8)
        return Frames(made), Edited(
            number=work.number,
            index=index,
            recomputed=0.5,
            steps=4,
            compute_ms=40.0,
            ahead_ms=10.0,
            wait_ms=1.0,
            mask=np.ones((3, 1, 1), bool) if work.frames.size else None,
            state=None if work.last else self.snapshot(),
        )

    @property
    def wanted(self) -> int:
        return FIRST if self.chunks == 0 else CHUNK


class Editors:
    """`work.Backend`: they die, leave, are full or slow when they are told to."""

    def __init__(self) -> None:
        self.full = self.stillborn = self.broken = False
        self.model = "known"  # by which they edit
        self.chunk_s = 0.0  # that a chunk takes
        self.places: list[int] = []  # in the queue, told twice a second before a stream is open
        self.openings: list[Opening] = []
        self.open = 0  # streams now
        self._end: asyncio.Future[str] | None = None

    def die(self) -> None:
        self._all("die")

    def leave(self) -> None:
        self._all("leave")

    def fail(self) -> None:
        self._all("fail")

    def _all(self, what: str) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.set_result(what)

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        self.openings.append(opening)
        if self.full:
            raise WireError("at_capacity", "no room", RETRY_AFTER_S)
        if self.broken:
            raise WireError("internal", "the editor failed; its log says why")
        if self.stillborn:
            raise EditorLostError("died before it took the stream")
        for place in self.places:
            yield Queued(place, 10.0 * place)
            await asyncio.sleep(0.5)
        if self._end is None:
            self._end = asyncio.get_running_loop().create_future()
        end = self._end
        stream = Known.restore(opening.state)
        self.open += 1
        try:
            yield Ready(self.model, CHUNK, FIRST, stream.chunks)
            while True:
                taking = asyncio.ensure_future(take())
                try:
                    await asyncio.wait({taking, end}, return_when=asyncio.FIRST_COMPLETED)
                    if end.done() and end.result() == "leave" and not taking.done():
                        yield Moved(stream.snapshot(), len(stream.pending))
                        return
                    half_s = self.chunk_s / 2
                    if taking.done() and half_s and not taking.result().more:
                        await asyncio.wait({end}, timeout=half_s)
                    if end.done() and end.result() == "fail":
                        raise WireError("internal", "the editor failed; its log says why")
                    if end.done() and end.result() == "die":
                        raise EditorLostError("died")
                    work = taking.result()
                finally:
                    taking.cancel()
                assert work.frames.shape[1:] == (opening.height, opening.width, 3)
                if (made := stream.push(work)) is not None:
                    frames, edited = made
                    yield frames
                    if half_s:  # while the rest of it is made
                        await asyncio.wait({end}, timeout=half_s)
                    if end.done() and end.result() == "die":
                        raise EditorLostError("died")
                    yield edited
                if work.last:
                    return
        finally:
            self.open -= 1
