"""The form of `POST /v1/edits`, taken in within limits: a video, and what to make of it."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, cast, get_args

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from data.video import VideoInfo, probe
from serve.limits import Limits
from serve.wire.protocol import Detail, Open, WireError

FIELDS = ("prompt", "seed", "video", "work_size", "detail", "model")
MAX_SEED_DIGITS = 19  # of 2^63


@dataclass(frozen=True)
class Asked:
    """What the form says beside the video; None is the server's default."""

    prompt: str
    seed: int = 0
    work_size: str | None = None
    detail: Detail | None = None
    model: str | None = None


async def read_form(request: Request, limits: Limits, path: Path) -> Asked:
    """Stores the video at `path`. Raises WireError."""
    try:
        async with _limited(request, limits).form(max_files=1, max_fields=8) as form:
            video, prompt, seed = form.get("video"), form.get("prompt"), form.get("seed", "0")
            work_size, detail = form.get("work_size"), form.get("detail")
            model = form.get("model")
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
    if work_size is not None and not isinstance(work_size, str):
        raise WireError("bad_request", "the field work_size must be text, got a file")
    if model is not None and not isinstance(model, str):
        raise WireError("bad_request", "the field model must be text, got a file")
    if detail is not None and detail not in get_args(Detail):
        shown = str(detail)[:60]
        raise WireError(
            "bad_request",
            f"the field detail must be one of {', '.join(get_args(Detail))}, got {shown!r}",
        )
    return Asked(prompt, int(seed), work_size, cast(Detail | None, detail), model)


async def check_video(path: Path, limits: Limits, asked: Asked) -> tuple[Open, VideoInfo]:
    """The session that the video asks for. Raises WireError and VideoError."""
    info = await asyncio.to_thread(probe, path)
    limits.check_video(info.frames or 0, info.duration)
    fps = max(limits.min_fps, float(min(info.fps, Fraction(limits.max_fps))))
    message = Open(
        asked.prompt, info.width, info.height, fps, "lossless", "rgb24", seed=asked.seed,
        work_size=asked.work_size, detail=asked.detail, model=asked.model,
    )  # fmt: skip
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
