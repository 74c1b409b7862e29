"""The form of `POST /v1/edits`, taken in within limits: a video, a prompt, a seed."""

from __future__ import annotations

import asyncio
import shutil
import time
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from data.video import VideoInfo, probe
from serve.limits import Limits
from serve.wire.protocol import Open, WireError

FIELDS = ("prompt", "seed", "video")
MAX_SEED_DIGITS = 19  # of 2^63


async def read_form(request: Request, limits: Limits, path: Path) -> tuple[str, int]:
    """Stores the video at `path`; returns prompt and seed. Raises WireError."""
    try:
        async with _limited(request, limits).form(max_files=1, max_fields=8) as form:
            video, prompt, seed = form.get("video"), form.get("prompt"), form.get("seed", "0")
            unknown = sorted(set(form) - set(FIELDS))
            if unknown:
                raise WireError(
                    "bad_request", f"no field {unknown[0][:60]!r}; send {', '.join(FIELDS)}"
                )
            if not isinstance(video, UploadFile):
                raise WireError("bad_request", "the field video must be a file")
            if not isinstance(prompt, str):
                raise WireError("bad_request", "the field prompt is missing")
            await asyncio.to_thread(_copy, video.file, path)
    except HTTPException as error:  # starlette, for a body that is no form
        raise WireError("bad_request", str(error.detail)) from error
    if not (isinstance(seed, str) and seed.isascii() and seed.isdigit()):
        shown = str(seed)[:60]
        raise WireError("bad_request", f"the field seed must be a whole number, got {shown!r}")
    if len(seed) > MAX_SEED_DIGITS:
        raise WireError("bad_request", f"the field seed has {len(seed)} digits; at most 2^63 - 1")
    return prompt, int(seed)


async def check_video(path: Path, limits: Limits, prompt: str, seed: int) -> tuple[Open, VideoInfo]:
    """The session that the video asks for. Raises WireError and VideoError."""
    info = await asyncio.to_thread(probe, path)
    limits.check_video(info.frames or 0, info.duration)
    fps = max(limits.min_fps, float(min(info.fps, Fraction(limits.max_fps))))
    message = Open(prompt, info.width, info.height, fps, "lossless", "rgb24", seed=seed)
    limits.check_open(message)
    return message, info


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
