"""POST /v1/edits: a whole video in, the edited one streamed back while it is being edited."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message

from data.video import VideoError, VideoInfo, VideoWriter, probe, read_frames
from serve.front.driver import drive
from serve.front.running import Services
from serve.front.session import Delivery, Session, State
from serve.wire.protocol import Open, WireError
from serve.wire.work import Opening, Ready

log = logging.getLogger(__name__)

STATUS = {"at_capacity": 503, "unsupported_size": 422, "internal": 500}
FIELDS = {"video", "prompt", "seed"}


class Edits:
    """The route. A request is a lossless session without a socket."""

    def __init__(self, services: Services) -> None:
        self.services = services

    async def post(self, request: Request) -> Response:
        """multipart/form-data with `video`, `prompt` and optionally `seed`; answers video/mp4."""
        files = ExitStack()
        try:
            folder = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="liveedit-")))
            opening, info = await self._read(request, folder / "video")
            body = self._edit(folder / "video", opening, info)
            # The first piece comes when an editor has the video: until then it can be refused.
            first = await anext(body)
        except WireError as error:
            files.close()
            self.services.metrics.refused.labels(error.code).inc()
            return _refused(error)
        except VideoError as error:
            files.close()
            return _refused(WireError("bad_request", str(error)))
        except BaseException:
            files.close()
            raise
        headers = {"X-LiveEdit-Session": opening.session}
        return StreamingResponse(_all(first, body, files), media_type="video/mp4", headers=headers)

    async def _read(self, request: Request, path: Path) -> tuple[Opening, VideoInfo]:
        """Stores the video at `path`. Raises WireError and VideoError."""
        limits = self.services.limits
        try:
            async with _limited(request, limits.max_upload).form(max_files=1) as form:
                video, prompt, seed = form.get("video"), form.get("prompt"), form.get("seed")
                unknown = sorted(set(form) - FIELDS)
                if unknown:
                    raise WireError("bad_request", f"no field {unknown[0]!r}; send {FIELDS}")
                if not isinstance(video, UploadFile):
                    raise WireError("bad_request", "the field video must be a file")
                if not isinstance(prompt, str):
                    raise WireError("bad_request", "the field prompt is missing")
                await asyncio.to_thread(_copy, video.file, path)
        except HTTPException as error:  # starlette, for a body that is no form
            raise WireError("bad_request", str(error.detail)) from error
        if seed is not None and not (isinstance(seed, str) and seed.isascii() and seed.isdigit()):
            raise WireError("bad_request", f"the field seed must be a whole number, got {seed!r}")
        info = await asyncio.to_thread(probe, path)
        fps = float(min(info.fps, Fraction(limits.max_fps)))
        message = Open(
            prompt, info.width, info.height, fps, "lossless", "rgb24", seed=int(str(seed or 0))
        )
        limits.check_open(message)
        return _opening(message), info

    async def _edit(self, path: Path, opening: Opening, info: VideoInfo) -> AsyncGenerator[bytes]:
        services, metrics = self.services, self.services.metrics
        fps = min(info.fps, Fraction(services.limits.max_fps))
        session = Session(
            opening.session,
            prompt=opening.prompt,
            mode="lossless",
            width=opening.width,
            height=opening.height,
        )
        started = time.monotonic()
        feeding: asyncio.Task[None] | None = None
        sink = _Sink()
        try:
            async with aclosing(drive(services.backend, session, opening, metrics)) as events:
                await anext(events)
                metrics.admitted.inc()
                log.info("session %s: a video of %dx%d", session.name, info.width, info.height)
                feeding = asyncio.create_task(_feed(session, path, fps))
                writer = await asyncio.to_thread(
                    partial(
                        VideoWriter, cast(BinaryIO, sink), opening.width, opening.height, fps,
                        audio_from=path if info.has_audio else None, fragmented=True,
                    )
                )  # fmt: skip
                with writer:
                    yield sink.take()
                    while (delivery := await _next(events, feeding)) is not None:
                        frames = delivery.edited.frames
                        if len(frames):
                            await asyncio.to_thread(writer.write, frames)
                            metrics.frames.inc(len(frames))
                            metrics.gpu_seconds.inc(delivery.edited.device_s)
                            metrics.recomputed.observe(delivery.edited.recomputed)
                        if piece := sink.take():
                            yield piece
                        session.sent(len(frames))
                yield sink.take()
            log.info("session %s: done in %.1f s", session.name, time.monotonic() - started)
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
            session.to(State.CLOSED)


async def _next(events: AsyncIterator[Any], feeding: asyncio.Task[None]) -> Delivery | None:
    """The next delivery, None after the last; raises what stopped the feeding."""
    following = asyncio.ensure_future(anext(events, None))
    try:
        while not following.done():
            waiting = {following} if feeding.done() else {following, feeding}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()
        event = following.result()
        assert not isinstance(event, Ready)
        return event
    finally:
        following.cancel()


async def _feed(session: Session, path: Path, fps: Fraction) -> None:
    frames = read_frames(path, fps=fps)
    number = 0
    while (frame := await asyncio.to_thread(next, frames, None)) is not None:
        await session.room()
        session.feed(number, 0, np.asarray(frame))
        number += 1
    session.finish()


async def _all(first: bytes, rest: AsyncGenerator[bytes], files: ExitStack) -> AsyncIterator[bytes]:
    with files:
        async with aclosing(rest) as pieces:
            yield first
            async for piece in pieces:
                yield piece


def _opening(message: Open) -> Opening:
    return Opening(
        session=secrets.token_hex(6),
        prompt=message.prompt,
        width=message.width,
        height=message.height,
        fps=message.fps,
        mode="lossless",
        seed=message.seed or 0,
    )


def _copy(source: BinaryIO, path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(source, target)


def _limited(request: Request, limit: int) -> Request:
    """The request, read no further than `limit` bytes. Raises WireError on the way."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise WireError("bad_request", f"the upload is larger than {limit} bytes")
        return message

    return Request(request.scope, receive)


def _refused(error: WireError) -> Response:
    headers = {"Retry-After": f"{error.retry_after_s:.0f}"} if error.retry_after_s else {}
    content = {"error": {"code": error.code, "message": error.message}}
    return JSONResponse(content, STATUS.get(error.code, 400), headers=headers)


class _Sink:
    """Collects what the muxer writes until it is taken; not seekable, like a socket."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
