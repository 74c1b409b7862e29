"""POST /v1/edits: a whole video in, the edited one streamed back while it is being edited."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from data.video import Damage, VideoError, VideoInfo, VideoWriter, differences, read_timed
from serve.delivery.driver import drive
from serve.delivery.session import Delivery, Session, State
from serve.front.account import refused
from serve.front.door import Visitor, refusal
from serve.front.running import Services
from serve.front.upload import Asked, check_video, read_form
from serve.logs import one_line
from serve.wire.protocol import RETRY_AFTER_S, Open, WireError
from serve.wire.work import Frames, Ready

log = logging.getLogger(__name__)


class Edits:
    """The route. A request is a lossless session without a socket.

    `refusal` says what speaks against taking another session at this front.
    """

    def __init__(self, services: Services, refusal: Callable[[], WireError | None]) -> None:
        self.services = services
        self.open: set[VideoEdit] = set()
        self.running = 0  # requests, from their upload to the last byte of their answer
        self._refusal = refusal
        self._uploads = 0

    def leave(self) -> None:
        """What still runs is ended: it cannot move."""
        for edit in self.open:
            edit.end(WireError("draining", "this server is going away; send the video again"))

    async def post(self, request: Request) -> Response:
        """multipart/form-data with `video`, `prompt` and optionally `seed`, `work_size`,
        `detail` and `model`; answers video/mp4."""
        visitor: Visitor = request.state.visitor
        full = self._refusal()
        if full is None and self._uploads >= self.services.limits.max_uploads:
            message = f"{self._uploads} uploads are coming in already; try again later"
            full = WireError("at_capacity", message, RETRY_AFTER_S)
        if full is not None:
            return self._refused(visitor, full)
        files = ExitStack()
        self.running += 1
        files.callback(self._ended)
        try:
            folder = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="liveedit-")))
            path = folder / "video"
            asked = await self._uploaded(request, path)
            wanted, info = await check_video(path, self.services.limits, asked)
            differs = await asyncio.to_thread(differences, path)
            if (full := self._refusal()) is not None:  # the upload took its time
                raise full
            edit = VideoEdit(self.services, visitor, path, wanted, info)
            self.open.add(edit)
            files.callback(self.open.discard, edit)
            body = edit.run()
            # The first piece comes when an editor has the video: until then it can be refused.
            first = await anext(body)
        except WireError as error:
            files.close()
            return self._refused(visitor, error)
        except VideoError as error:
            files.close()
            # The path is this machine's, and nobody else's business.
            shown = str(error).replace(str(path), "the video")
            return self._refused(visitor, WireError("bad_request", shown))
        except ClientDisconnect:
            files.close()
            return Response(status_code=400)  # nobody reads it
        except BaseException:
            files.close()
            raise
        headers = {
            "X-LiveEdit-Session": edit.session.name,
            "X-LiveEdit-Work-Size": edit.session.opening.work_size,
        }
        if differs:
            told = one_line("; ".join(differs))
            log.info("session %s: %s", edit.session.name, told)
            headers["X-LiveEdit-Differs"] = _ascii(told)
        if edit.unknown:
            headers["X-LiveEdit-Unknown-Words"] = _ascii(edit.unknown)
        return _EditedVideo(first, body, files, headers)

    async def _uploaded(self, request: Request, path: Path) -> Asked:
        self._uploads += 1
        try:
            return await read_form(request, self.services.limits, path)
        finally:
            self._uploads -= 1

    def _ended(self) -> None:
        self.running -= 1

    def _refused(self, visitor: Visitor, error: WireError) -> Response:
        refused(
            self.services.metrics, error.code, error.message,
            tenant=visitor.tenant.name, client=visitor.client,
        )  # fmt: skip
        return refusal(error)


class VideoEdit:
    """One video: `run` yields pieces of the edited MP4. What ends it early cuts the answer, so that
    its client sees that the video is not whole."""

    def __init__(
        self, services: Services, visitor: Visitor, path: Path, message: Open, info: VideoInfo
    ) -> None:
        self.services, self.visitor, self.path, self.info = services, visitor, path, info
        opening = services.opening(message, visitor.tenant.name)
        self.session = Session(opening)
        self.unknown = ""  # words that the model was never taught, once an editor has said so
        self._account = services.account(visitor, opening)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, error: WireError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    def revoke(self) -> None:
        """The visitor's token is no longer good."""
        self.end(WireError("unauthorized", "this token is no longer accepted"))

    def stop(self, reason: str) -> None:
        """Its tenant's minutes are used up."""
        self.end(WireError("at_capacity", f"your limit is reached: the video's time is {reason}"))

    async def run(self) -> AsyncGenerator[bytes]:
        outcome = "disconnected"
        try:
            await self._account.enter()
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    yield piece
            outcome = "close"
        except WireError as error:
            outcome = error.code
            raise
        except VideoError:
            outcome = "bad_request"
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self._failed.cancel()
            self.session.to(State.CLOSED)
            # Shielded: this may run because the request's task was cancelled.
            await asyncio.shield(self._account.ended(outcome))

    async def _pieces(self) -> AsyncGenerator[bytes]:
        session, opening, info = self.session, self.session.opening, self.info
        limit = Fraction(self.services.limits.max_fps)
        fps = None if info.fps <= limit else limit  # a constant rate, in place of the file's
        damage = Damage()
        times: deque[Fraction] = deque()  # of the frames that are being edited
        feeding: asyncio.Task[None] | None = None
        sink = _Sink()
        driven = drive(self.services.backend, session, self.services.metrics)
        try:
            async with aclosing(driven) as events:
                ready = await _next(events, self._failed)
                assert isinstance(ready, Ready)
                self._account.opened(ready.model)
                self.unknown = ready.unknown
                feeding = asyncio.create_task(self._feed(fps, times, damage))
                writer = await asyncio.to_thread(
                    partial(
                        VideoWriter, cast(BinaryIO, sink), opening.width, opening.height,
                        fps or info.bulk_fps or info.fps, tick=info.tick if fps is None else None,
                        audio_from=self.path, damage=damage, fragmented=True,
                    )
                )  # fmt: skip
                with writer:
                    yield sink.take()
                    while (event := await _next(events, feeding, self._failed)) is not None:
                        if isinstance(event, Frames):
                            frames = event.frames
                            continue
                        assert isinstance(event, Delivery)
                        if len(frames):
                            shown = [times.popleft() for _ in frames]
                            await asyncio.to_thread(writer.write, frames, shown)
                        self._account.delivered(event, chunk_frames=session.chunk_frames, dropped=0)
                        if piece := sink.take():
                            yield piece
                        session.sent(len(frames))
                yield sink.take()
            if damage:
                log.warning("session %s: the video is damaged: %s", session.name, damage)
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)

    async def _feed(self, fps: Fraction | None, times: deque[Fraction], damage: Damage) -> None:
        frames = read_timed(self.path, fps=fps, damage=damage)
        number = 0
        while (read := await asyncio.to_thread(next, frames, None)) is not None:
            moment, frame = read
            self.services.limits.check_video(number + 1, float(moment))
            await self.session.room()
            times.append(moment)
            self.session.feed(number, 0, frame)
            number += 1
        self.session.finish()


async def _next(events: AsyncIterator[Any], *others: asyncio.Future[None]) -> Any:
    """The next event, None after the last; raises what any of `others` failed with."""
    following = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            for other in others:  # also one that failed while nobody waited
                if other.done():
                    other.result()
            if following.done():
                return following.result()
            waiting = {following, *(other for other in others if not other.done())}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        following.cancel()
        # Until it has ended the generator counts as running, and could not be closed.
        await asyncio.gather(following, return_exceptions=True)


class _EditedVideo(StreamingResponse):
    """The `first` piece and the `rest`, which has begun. Ends the `rest` and then closes `files`,
    also when the client left before it was sent anything."""

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes], files: ExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(self._pieces(first), media_type="video/mp4", headers=headers)
        self._rest, self._files = rest, files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._files:
            async with aclosing(self._rest):
                await super().__call__(scope, receive, send)

    async def _pieces(self, first: bytes) -> AsyncIterator[bytes]:
        yield first
        async for piece in self._rest:
            yield piece


def _ascii(text: str) -> str:
    """As a header takes it: names in a file and words of a prompt may hold any character."""
    return one_line(text).encode("ascii", "replace").decode()


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
