"""The editor's side of every session with one model: streams, and their order on the accelerator.

Runs in the editor replica; the models that an editor holds (`shelf`) share an `Accelerator`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from modeling.detail.work_size import in_words
from modeling.editor import StreamingEditor
from modeling.streaming.state import StateError, StreamState
from modeling.streaming.stream import EditedChunk, EditStream
from serve.admission.admission import Sizes
from serve.admission.rungs import FULL
from serve.editor.accelerator import Accelerator
from serve.editor.capacity import native, quality_of
from serve.editor.scheduler import Ran
from serve.editor.splitter import Splitter, joined
from serve.editor.stream import EditorStream
from serve.versions.source import describe, shown
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.work import (
    Edited,
    EditorEvent,
    Frames,
    Moved,
    Opening,
    Ready,
    SupersededError,
    Take,
    Work,
)
from serve.work_sizes import sizes_of

ROLLING = "rolling"  # why a stream moves to another version of its model
MAX_CHUNK_S = 30.0  # a size whose chunk would cost more is refused

T = TypeVar("T")

log = logging.getLogger(__name__)


class Engine:
    """Implements `work.Backend` on one loaded model, `key` among those that `on` has."""

    def __init__(self, editor: StreamingEditor, key: str, on: Accelerator) -> None:
        self.editor, self.key, self.on = editor, key, on
        self.scheduler, self.capacity = self.on.scheduler, self.on.capacity
        self._streams = self.on.streams
        self._leaving = asyncio.Event()
        self._why = ""
        self._releases: set[asyncio.Future[None]] = set()

    def warm_up(
        self, sizes: Iterable[Sizes] = (), tell: Callable[[str], None] = lambda doing: None
    ) -> float:
        """Seconds that a chunk of the model's own size costs here; before any session.

        Streams of `sizes` start as quickly as those of that size; `tell` hears what is done.
        """
        for _ in self.capacity.warm_up(self.editor, self.key, sizes, tell):
            pass
        return self.chunk_s

    @property
    def chunk_s(self) -> float:
        """Seconds of a chunk of the model's own size."""
        return self.capacity.cost(native(self.editor, self.key))

    def describe(self) -> dict[str, Any]:
        """What `/v1/models` says: to strangers, so of the card, which names paths, little."""
        editor = self.editor
        return {
            **describe(editor.config, editor.name),
            "device": str(editor.device),
            "chunk_seconds": round(self.chunk_s, 4),
            "frame_seconds": self.capacity.frame_s,
            "card": shown(editor.card),
        }

    @property
    def sessions(self) -> int:
        """That have a stream here."""
        return sum(load.opening.version == self.key for load in self.capacity.loads.values())

    def leave(self, why: str = "drain") -> None:
        """From now on every session is given back as `Moved` at its next chunk."""
        self._why = self._why or why
        self._leaving.set()

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        """See `work.Backend.edit`. Raises WireError `unsupported_size`, too."""
        self._check_cost(opening)
        asked = next(self.on.asked)
        await self._end_older(opening, asked)
        settings = self.editor.settings
        with self._admitted(opening, asked) as at:
            opened = await self._run(at, partial(_open, self.editor, opening), due=0.0)
            stream, splitter = opened.value, Splitter(opening.state)
            yield Ready(
                model=self.editor.name,
                chunk_frames=settings.chunk_frames,
                first_chunk_frames=settings.first_chunk_frames,
                chunks=stream.chunks,
                unknown=self._unknown(opening.prompt),
            )
            ahead_s = 0.0
            while True:
                work = await at.until(self._next(take))
                if work is None:
                    # Caches are of no use to another version.
                    compact = self._why == ROLLING
                    taken = partial(stream.snapshot, compact=compact)
                    snapshot = await self._run(at, taken, due=0.0)
                    state = await splitter.split(snapshot.value)
                    yield Moved(state, 0 if compact else stream.pending_frames, self._why)
                    return
                await self._suit(at, stream)
                if work.more:
                    begin = partial(_begin, stream, work.frames)
                    due = at.due(len(work.frames), 2.0)
                    ahead_s += (await self._run(at, begin, due=due)).run_s
                    continue
                async with aclosing(self._edit(at, stream, splitter, work, ahead_s)) as events:
                    async for event in events:
                        yield event
                ahead_s = 0.0
                if work.last:
                    return

    @contextmanager
    def _admitted(self, opening: Opening, asked: int) -> Iterator[EditorStream]:
        """A stream that is counted in. Raises WireError `at_capacity`."""
        name = self.capacity.admit(opening)
        stream = EditorStream(name, opening, self.editor.settings.chunk_frames, asked)
        self._streams[opening.session] = stream
        try:
            self._weigh()
            yield stream
        finally:
            del self._streams[opening.session]
            stream.close()
            if not stream.running:
                self.capacity.release(name)
            else:  # its client is gone, its chunk still takes the accelerator
                release = asyncio.ensure_future(self._release(stream))
                self._releases.add(release)
                release.add_done_callback(self._releases.discard)

    def _weigh(self) -> None:
        """Everybody's rung, by what is known now; who cannot be kept is told so."""
        decision = self.capacity.decide()
        for at in self._streams.values():
            if at.name == decision.close:
                at.end(
                    WireError(
                        "too_slow",
                        "the server is full and cannot keep up with this session, however small it "
                        "is edited; try again later, with fewer frames a second or smaller ones",
                        RETRY_AFTER_S,
                    )
                )

    async def _suit(self, at: EditorStream, stream: EditStream) -> None:
        """Before a chunk's first frames: edit it as its rung says."""
        if stream.pending_frames:  # of a stream that came in the middle of a chunk, too
            return
        rung = self.capacity.rung(at.name)
        quality = quality_of(rung)
        if stream.quality != quality:
            await self._run(at, partial(stream.change, quality), due=0.0)
        at.changed, at.rung = at.rung not in (None, rung), rung

    def _check_cost(self, opening: Opening) -> None:
        """A size whose chunks are far beyond this editor is refused before they are tried."""
        cost = self.capacity.cost(sizes_of(opening))
        if cost > MAX_CHUNK_S:
            raise WireError(
                "unsupported_size",
                f"a chunk of {opening.width}x{opening.height}, edited at {opening.work_size}, "
                f"would take about {cost:.0f} s here; at most {MAX_CHUNK_S:g} s: choose a smaller "
                "work size, or send smaller frames",
            )

    async def _end_older(self, opening: Opening, asked: int) -> None:
        """A session has one stream: the newer holder's, of one holder's the one asked for last,
        whichever of two finds its place free first. Raises SupersededError for an older one."""
        while (other := self._streams.get(opening.session)) is not None:
            if (other.opening.epoch, other.asked) > (opening.epoch, asked):
                raise SupersededError
            other.end(SupersededError())
            await asyncio.sleep(0.001)

    async def _release(self, stream: EditorStream) -> None:
        await stream.idle()
        self.capacity.release(stream.name)

    async def _next(self, take: Take) -> Work | None:
        """The next work, or None when this editor is leaving."""
        if self._leaving.is_set():
            return None
        taking = asyncio.ensure_future(take())
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait({taking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return taking.result() if taking.done() else None
        finally:
            taking.cancel()
            leaving.cancel()

    async def _run(self, at: EditorStream, function: Callable[[], T], *, due: float) -> Ran[T]:
        """On the accelerator."""
        cost = self.capacity.cost(sizes_of(at.opening))
        try:
            return await at.run(self.scheduler, function, due=due, cost_s=cost)
        except torch.AcceleratorError as error:  # a CUDA context does not come back from these
            self.on.broken = str(error)
            raise

    async def _edit(
        self, at: EditorStream, stream: EditStream, splitter: Splitter, work: Work, ahead_s: float
    ) -> AsyncGenerator[Frames | Edited]:
        came, opening = time.monotonic(), at.opening
        due = at.due(len(work.frames), 1.0)
        ran = await self._run(at, partial(_step, stream, work), due=due)
        chunk, state = ran.value
        if chunk is None:
            assert work.last
            yield Frames(np.empty((0, opening.height, opening.width, 3), np.uint8))
            yield Edited(
                number=work.number, index=stream.chunks, recomputed=0.0, steps=0, compute_ms=0.0,
                ahead_ms=0.0, wait_ms=ran.wait_s * 1000, mask=None, state=None,
            )  # fmt: skip
            return
        # Its state is packed while its frames go ahead, to be coded: nothing waits for it alone.
        splitting = None if state is None else asyncio.ensure_future(splitter.split(state))
        yield Frames(chunk.frames)
        # A chunk is answered before it is made history; it costs that, too.
        cost = max(ahead_s + ran.run_s, chunk.compute_ms / 1000)
        rung = self.capacity.rung(at.name)
        sizes = sizes_of(opening).at(rung)
        # The first chunk on a rung may prepare what those after it use.
        if at.rung == rung and not at.changed and self._tells(at, sizes):
            self.capacity.observe(sizes, cost, at.name)
        at.edited += 1
        self._weigh()
        yield Edited(
            number=work.number,
            index=chunk.index,
            recomputed=chunk.recomputed,
            steps=chunk.steps,
            compute_ms=ran.run_s * 1000,
            ahead_ms=ahead_s * 1000,
            wait_ms=ran.wait_s * 1000,
            mask=chunk.mask if opening.mask else None,
            state=None if splitting is None else await splitting,
            unknown=self._unknown(work.prompt),
            rung=at.rung.name if at.rung else FULL,
            work_size=in_words(stream.work),
            held_ms=(time.monotonic() - came) * 1000,
        )

    def _tells(self, at: EditorStream, sizes: Sizes) -> bool:
        """Whether its chunk costs what later ones will. A stream's first see a shorter window, and
        at a size that is new here a GPU makes its graphs; so they count only where nothing better
        is known: ten sessions that begin together would shut the door for ten others."""
        settings = self.editor.settings
        filling = settings.window_latents // settings.chunk_latents + 1
        return at.edited >= filling or sizes not in self.capacity.warm

    def _unknown(self, prompt: str) -> str:
        return ", ".join(self.editor.unknown_words(prompt))


def _open(editor: StreamingEditor, opening: Opening) -> EditStream:
    if opening.state is not None:
        try:
            return editor.restore(joined(opening.state))
        except StateError as error:
            raise WireError(
                "bad_request",
                "this session was edited by another model than is served now; open a new session",
            ) from error
    return editor.open(
        opening.prompt, height=opening.height, width=opening.width, seed=opening.seed,
        work_size=opening.work_size, detail=opening.detail,
    )  # fmt: skip


def _begin(stream: EditStream, frames: np.ndarray) -> None:
    """The first frames of a chunk, on the accelerator's thread."""
    edited = list(stream.push(frames))
    assert not edited, f"{len(frames)} frames ahead completed a chunk"


def _step(stream: EditStream, work: Work) -> tuple[EditedChunk | None, StreamState | None]:
    """One chunk, on the accelerator's thread."""
    if work.prompt != stream.prompt:
        stream.set_prompt(work.prompt)
    chunks = list(stream.push(work.frames)) if len(work.frames) else []
    if work.last:
        rest = stream.flush()
        chunks += [rest] if rest else []
    assert len(chunks) <= 1, f"{len(work.frames)} frames made {len(chunks)} chunks"
    chunk = chunks[0] if chunks else None
    return chunk, None if work.last else stream.snapshot(compact=True)
