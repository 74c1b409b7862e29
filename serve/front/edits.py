"""POST /v1/edits: a whole video in, the edited one streamed back while it is being edited."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from data.video import (
    Damage,
    VideoError,
    VideoInfo,
    VideoWriter,
    differences,
    probe,
    read_timed,
)
from serve.front.driver import drive
from serve.front.running import Services
from serve.front.session import Delivery, Session, State
from serve.limits import Limits
from serve.wire.protocol import RETRY_AFTER_S, Open, WireError
from serve.wire.work import Opening, Ready

log = logging.getLogger(__name__)

STATUS = {
    "at_capacity": 503, "draining": 503, "too_slow": 408, "unsupported_size": 422, "internal": 500,
}  # fmt: skip
FIELDS = {"video", "prompt", "seed"}
MAX_SEED_DIGITS = 19  # of 2^63


class Edits:
    """The route. A request is a lossless session without a socket.

    `refusal` says what speaks against taking another session at this front.
    """

    def __init__(self, services: Services, refusal: Callable[[], WireError | None]) -> None:
        self.services = services
        self._refusal = refusal
        self.running = 0  # requests, from their upload to the last byte of their answer
        self._uploads = 0

    async def post(self, request: Request) -> Response:
        """multipart/form-data with `video`, `prompt` and optionally `seed`; answers video/mp4."""
        refused = self._refusal()
        if refused is None and self._uploads >= self.services.limits.max_uploads:
            message = f"{self._uploads} uploads are coming in already; try again later"
            refused = WireError("at_capacity", message, RETRY_AFTER_S)
        if refused is not None:
            self.services.metrics.refused.labels(refused.code).inc()
            return _refused(refused)
        files = ExitStack()
        self.running += 1
        files.callback(self._ended)
        try:
            folder = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="liveedit-")))
            opening, info = await self._read(request, folder / "video")
            differs = await asyncio.to_thread(differences, folder / "video")
            body = self._edit(folder / "video", opening, info)
            # The first piece comes when an editor has the video: until then it can be refused.
            first = await anext(body)
        except WireError as error:
            files.close()
            self.services.metrics.refused.labels(error.code).inc()
            return _refused(error)
        except VideoError as error:
            files.close()
            # The path is this machine's, and nobody else's business.
            message = str(error).replace(str(folder / "video"), "the video")
            return _refused(WireError("bad_request", message))
        except ClientDisconnect:
            files.close()
            return Response(status_code=400)  # nobody reads it
        except BaseException:
            files.close()
            raise
        headers = {"X-LiveEdit-Session": opening.session}
        if differs:
            log.info("session %s: %s", opening.session, "; ".join(differs))
            # Names in a file may hold any letter, a header only these.
            headers["X-LiveEdit-Differs"] = "; ".join(differs).encode("ascii", "replace").decode()
        return _EditedVideo(_all(first, body), files, headers)

    def _ended(self) -> None:
        self.running -= 1

    async def _read(self, request: Request, path: Path) -> tuple[Opening, VideoInfo]:
        """Stores the video at `path`. Raises WireError and VideoError."""
        limits = self.services.limits
        self._uploads += 1
        try:
            async with _limited(request, limits).form(max_files=1, max_fields=8) as form:
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
        finally:
            self._uploads -= 1
        if seed is not None and not (isinstance(seed, str) and seed.isascii() and seed.isdigit()):
            raise WireError("bad_request", f"the field seed must be a whole number, got {seed!r}")
        if isinstance(seed, str) and len(seed) > MAX_SEED_DIGITS:
            raise WireError(
                "bad_request", f"the field seed has {len(seed)} digits; at most 2^63 - 1"
            )
        info = await asyncio.to_thread(probe, path)
        limits.check_video(info.frames or 0, info.duration)
        fps = max(limits.min_fps, float(min(info.fps, Fraction(limits.max_fps))))
        message = Open(
            prompt, info.width, info.height, fps, "lossless", "rgb24", seed=int(str(seed or 0))
        )
        limits.check_open(message)
        return _opening(message), info

    async def _edit(self, path: Path, opening: Opening, info: VideoInfo) -> AsyncGenerator[bytes]:
        services, metrics = self.services, self.services.metrics
        limit = Fraction(services.limits.max_fps)
        fps = None if info.fps <= limit else limit  # a constant rate, in place of the file's
        damage = Damage()
        times: deque[Fraction] = deque()  # of the frames that are being edited
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
                ready = await anext(events)
                assert isinstance(ready, Ready)
                metrics.admitted.inc()
                log.info("session %s: a video of %dx%d", session.name, info.width, info.height)
                feeding = asyncio.create_task(self._feed(session, path, fps, times, damage))
                writer = await asyncio.to_thread(
                    partial(
                        VideoWriter, cast(BinaryIO, sink), opening.width, opening.height,
                        fps or info.bulk_fps or info.fps, tick=info.tick if fps is None else None,
                        audio_from=path, damage=damage, fragmented=True,
                    )
                )  # fmt: skip
                with writer:
                    yield sink.take()
                    while (delivery := await _next(events, feeding)) is not None:
                        frames = delivery.edited.frames
                        if len(frames):
                            shown = [times.popleft() for _ in frames]
                            await asyncio.to_thread(writer.write, frames, shown)
                            metrics.frames.inc(len(frames))
                            metrics.gpu_seconds.inc(delivery.edited.device_s)
                            metrics.recomputed.observe(delivery.edited.recomputed)
                        if piece := sink.take():
                            yield piece
                        session.sent(len(frames))
                yield sink.take()
            log.info("session %s: done in %.1f s", session.name, time.monotonic() - started)
            if damage:
                log.warning("session %s: the video is damaged: %s", session.name, damage)
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
            session.to(State.CLOSED)

    async def _feed(
        self,
        session: Session,
        path: Path,
        fps: Fraction | None,
        times: deque[Fraction],
        damage: Damage,
    ) -> None:
        frames = read_timed(path, fps=fps, damage=damage)
        number = 0
        while (read := await asyncio.to_thread(next, frames, None)) is not None:
            moment, frame = read
            self.services.limits.check_video(number + 1, float(moment))
            await session.room()
            times.append(moment)
            session.feed(number, 0, frame)
            number += 1
        session.finish()


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
        assert event is None or isinstance(event, Delivery)
        return event
    finally:
        following.cancel()
        # Until it has ended the generator counts as running, and could not be closed.
        await asyncio.gather(following, return_exceptions=True)


async def _all(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(rest) as pieces:
        yield first
        async for piece in pieces:
            yield piece


class _EditedVideo(StreamingResponse):
    """Closes `files` when it ends, also when the client left before its first piece."""

    def __init__(
        self, body: AsyncGenerator[bytes], files: ExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(body, media_type="video/mp4", headers=headers)
        self._body, self._files = body, files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._files:
            async with aclosing(self._body):
                await super().__call__(scope, receive, send)


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


def _limited(request: Request, limits: Limits) -> Request:
    """The request, read no further and no longer than `limits` say. Raises WireError on the way."""
    received = 0
    deadline = time.monotonic() + limits.upload_s

    async def receive() -> Message:
        nonlocal received
        left = deadline - time.monotonic()
        try:
            async with asyncio.timeout(min(limits.upload_idle_s, left)):
                message = await request.receive()
        except TimeoutError:
            raise WireError(
                "too_slow",
                f"the upload brought {received} bytes and then none for {limits.upload_idle_s:g} s "
                f"or took longer than {limits.upload_s:g} s; send it faster",
            ) from None
        received += len(message.get("body", b""))
        if received > limits.max_upload:
            raise WireError("bad_request", f"the upload is larger than {limits.max_upload} bytes")
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
