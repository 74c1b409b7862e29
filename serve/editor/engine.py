"""The editor's side of every session: streams, their order on the accelerator, capacity.

Runs in the editor replica, or in the process of the front when there is no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from modeling.editor import StreamingEditor
from modeling.streaming.state import StreamState
from modeling.streaming.stream import EditedChunk, EditStream
from serve.editor.capacity import Capacity
from serve.editor.scheduler import LOSSLESS_PATIENCE, Ran, Scheduler
from serve.metrics import EditorMetrics
from serve.wire.work import Edited, Event, Moved, Opening, Ready, Take, Work

STUCK_S = 120.0
SMALL_STATE = 2**20  # bytes below which a thread costs more than it saves

T = TypeVar("T")

log = logging.getLogger(__name__)


class Engine:
    """Implements `work.Backend` on one loaded model.

    Args:
        max_sessions: Upper bound; below it `Capacity` decides, unless `measured` is False.
    """

    def __init__(
        self, editor: StreamingEditor, *, max_sessions: int = 8, measured: bool = True
    ) -> None:
        self.editor = editor
        self.scheduler = Scheduler()
        self.capacity = Capacity(
            chunk_frames=editor.settings.chunk_frames,
            max_sessions=max_sessions,
            measured=measured,
        )
        self.broken = ""
        self._leaving = asyncio.Event()

    def warm_up(self) -> float:
        """Seconds that a chunk of the model's own size costs here; before any session."""
        return self.capacity.warm_up(self.editor)

    def check(self) -> None:
        """Raises RuntimeError when the accelerator's thread is stuck or the device is broken."""
        since = self.scheduler.running_since
        if since is not None and time.monotonic() - since > STUCK_S:
            raise RuntimeError(f"one chunk has been running for more than {STUCK_S:g} s")
        if self.broken:
            raise RuntimeError(f"the accelerator is broken: {self.broken}")

    def describe(self) -> dict[str, Any]:
        """What `/v1/models` says."""
        settings, editor = self.editor.settings, self.editor
        return {
            "name": editor.name,
            "width": settings.width,
            "height": settings.height,
            "fps": settings.fps,
            "chunk_frames": settings.chunk_frames,
            "first_chunk_frames": settings.first_chunk_frames,
            "steps": len(settings.timesteps),
            "device": str(editor.device),
            "chunk_seconds": round(self.capacity.cost((settings.height, settings.width)), 4),
            "card": editor.card,
        }

    def gauge(self, metrics: EditorMetrics) -> None:
        """Sets the editor's gauges to what is true now."""
        settings = self.editor.settings
        metrics.load.set(self.capacity.load)
        metrics.sessions.set(len(self.capacity.loads))
        metrics.chunk.set(self.capacity.cost((settings.height, settings.width)))
        metrics.queue.set(self.scheduler.waiting)
        metrics.busy.set(self.scheduler.busy_s)

    def leave(self) -> None:
        """From now on every session is given back as `Moved` at its next chunk."""
        self._leaving.set()

    def stay(self) -> None:
        """The opposite of `leave`."""
        self._leaving.clear()

    def stop(self) -> None:
        self.scheduler.stop()

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[Event]:
        """See `work.Backend.edit`."""
        self.capacity.admit(opening)
        try:
            ran = await self.scheduler.run(partial(_open, self.editor, opening), due=0.0)
            stream = ran.value
            settings = self.editor.settings
            yield Ready(
                model=self.editor.name,
                chunk_frames=settings.chunk_frames,
                first_chunk_frames=settings.first_chunk_frames,
                chunks=stream.chunks,
            )
            ahead_s = 0.0
            while True:
                work = await self._next(take)
                if work is None:
                    snapshot = await self.scheduler.run(stream.snapshot, due=0.0)
                    state = await asyncio.to_thread(snapshot.value.to_bytes)
                    yield Moved(state, ahead=stream.pending_frames)
                    return
                if work.more:
                    began = await self._run(opening, partial(_begin, stream, work.frames), 2.0)
                    ahead_s += began.run_s
                    continue
                yield await self._edit(opening, stream, work, ahead_s)
                ahead_s = 0.0
                if work.last:
                    return
        finally:
            self.capacity.release(opening.session)

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

    async def _run(self, opening: Opening, function: Callable[[], T], chunks: float) -> Ran[T]:
        """On the accelerator, due in so many chunks' time if the session is live."""
        live = chunks * self.editor.settings.chunk_frames / opening.fps
        patience = live if opening.mode == "live" else LOSSLESS_PATIENCE
        try:
            return await self.scheduler.run(function, due=time.monotonic() + patience)
        except torch.AcceleratorError as error:  # a CUDA context does not come back from these
            self.broken = str(error)
            raise

    async def _edit(
        self, opening: Opening, stream: EditStream, work: Work, ahead_s: float
    ) -> Edited:
        ran = await self._run(opening, partial(_step, stream, work), 1.0)
        chunk, state = ran.value
        if chunk is None:
            return _nothing(work, opening, stream, ran.wait_s)
        # A GPU answers before it has refreshed its caches; the chunk costs that, too.
        cost = max(ahead_s + ran.run_s, chunk.compute_ms / 1000)
        self.capacity.observe((opening.height, opening.width), cost)
        return Edited(
            number=work.number,
            index=chunk.index,
            frames=chunk.frames,
            recomputed=chunk.recomputed,
            steps=chunk.steps,
            compute_ms=ran.run_s * 1000,
            ahead_ms=ahead_s * 1000,
            wait_ms=ran.wait_s * 1000,
            mask=chunk.mask if opening.mask else None,
            state=None if state is None else await _serialised(state),
        )


def _open(editor: StreamingEditor, opening: Opening) -> EditStream:
    if opening.state is not None:
        return editor.restore(StreamState.from_bytes(opening.state))
    return editor.open(
        opening.prompt, height=opening.height, width=opening.width, seed=opening.seed
    )


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


async def _serialised(state: StreamState) -> bytes:
    if state.history.nbytes < SMALL_STATE:
        return state.to_bytes()
    return await asyncio.to_thread(state.to_bytes)


def _nothing(work: Work, opening: Opening, stream: EditStream, wait_s: float) -> Edited:
    """The answer to a last work without frames."""
    assert work.last
    return Edited(
        number=work.number,
        index=stream.chunks,
        frames=np.empty((0, opening.height, opening.width, 3), np.uint8),
        recomputed=0.0,
        steps=0,
        compute_ms=0.0,
        ahead_ms=0.0,
        wait_ms=wait_s * 1000,
        mask=None,
        state=None,
    )
