"""The editor's side of every session: streams, their order on the accelerator, capacity.

Runs in the editor replica, or in the process of the front when there is no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import numpy as np

from modeling.editor import StreamingEditor
from modeling.stream import EditedChunk, EditStream
from modeling.stream_state import StreamState
from serve.capacity import Capacity
from serve.metrics import Metrics
from serve.scheduler import LOSSLESS_PATIENCE, Scheduler
from serve.work import Edited, Event, Moved, Opening, Ready, Take, Work

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
        self._leaving = asyncio.Event()

    async def warm_up(self) -> float:
        """Seconds that a chunk of the model's own size costs here."""
        ran = await self.scheduler.run(partial(self.capacity.warm_up, self.editor), due=0.0)
        log.info("a chunk costs %.0f ms here", ran.value * 1000)
        return ran.value

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

    def gauge(self, metrics: Metrics) -> None:
        """Sets the editor's gauges to what is true now."""
        settings = self.editor.settings
        metrics.editor_load.set(self.capacity.load)
        metrics.editor_sessions.set(len(self.capacity.loads))
        metrics.editor_chunk.set(self.capacity.cost((settings.height, settings.width)))
        metrics.editor_queue.set(self.scheduler.waiting)

    def leave(self) -> None:
        """From now on every session is given back as `Moved` at its next chunk."""
        self._leaving.set()

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
            while True:
                work = await self._next(take)
                if work is None:
                    snapshot = await self.scheduler.run(stream.snapshot, due=0.0)
                    yield Moved(await asyncio.to_thread(snapshot.value.to_bytes))
                    return
                yield await self._edit(opening, stream, work)
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

    async def _edit(self, opening: Opening, stream: EditStream, work: Work) -> Edited:
        period = len(work.frames) / opening.fps
        patience = period if opening.mode == "live" else LOSSLESS_PATIENCE
        ran = await self.scheduler.run(
            partial(_step, stream, work), due=time.monotonic() + patience
        )
        chunk, state = ran.value
        if chunk is None:
            return _nothing(work, opening, stream, ran.wait_s)
        self.capacity.observe((opening.height, opening.width), ran.run_s)
        return Edited(
            number=work.number,
            index=chunk.index,
            frames=chunk.frames,
            recomputed=chunk.recomputed,
            steps=chunk.steps,
            compute_ms=ran.run_s * 1000,
            wait_ms=ran.wait_s * 1000,
            mask=chunk.mask if opening.mask else None,
            state=None if state is None else await asyncio.to_thread(state.to_bytes),
        )


def _open(editor: StreamingEditor, opening: Opening) -> EditStream:
    if opening.state is not None:
        return editor.restore(StreamState.from_bytes(opening.state))
    return editor.open(
        opening.prompt, height=opening.height, width=opening.width, seed=opening.seed
    )


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
        wait_ms=wait_s * 1000,
        mask=None,
        state=None,
    )
