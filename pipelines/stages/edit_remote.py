"""A video file through a running server: `liveedit edit --url`, and the demo's live stage."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from data.video import VideoWriter, probe, read_frames
from infra.runtime.errors import UserError
from modeling.detail.work_size import in_pixels, in_words, unlike_training
from modeling.detail.work_size import work_size as work_size_in_pixels
from modeling.text.words import unknown_words
from pipelines.stages.edit_file import EditReport, FileOptions, check_edit, reported
from serve.client import EditedFrame, edit_frames, served_model
from serve.client.cameras import CameraLoad, CameraReport, camera, percentile
from serve.wire import codec
from serve.wire.protocol import Chunk, Detail, Opened, ServerMessage

ROUNDING = 1e-6  # a side that is whole but for its last bits is whole


def edit_remote(
    url: str,
    source: Path,
    output: Path,
    prompt: str,
    *,
    work_size: str | None = None,
    detail: Detail | None = None,
    seed: int = 0,
    model: str | None = None,
    token: str | None = None,
    **options: Unpack[FileOptions],
) -> EditReport:
    """As `edit_file.edit_video`, with a model of the server at `url`; null is its own choice.

    Frames larger than the server takes are sent as large as it does. Raises UserError for the file,
    WireError and ConnectError for the server.
    """
    check_edit(source, output, prompt)
    info = probe(source)
    told = served_model(url, model, token=token)
    size = within(info.height, info.width, told)
    shares: list[float] = []
    worked = in_words(size)  # what a server that does not say does

    def heard(message: ServerMessage) -> None:
        nonlocal worked
        if isinstance(message, Chunk):
            shares.append(message.recomputed)
        elif isinstance(message, Opened):
            worked = message.work_size or worked

    def edit(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        # A file has no clock of its own: the server plans with the rate of its model.
        return edit_frames(
            url, frames, prompt, fps=told["fps"], seed=seed, work_size=work_size, detail=detail,
            model=model, token=token, on_event=heard,
        )  # fmt: skip

    report = reported(edit, source, output, size, shares, work=size, **options)
    height, width = work_size_in_pixels(worked, *size)
    return replace(report, height=height, width=width)


def within(height: int, width: int, model: dict[str, Any]) -> tuple[int, int]:
    """The largest size of this shape that the server takes, by what it says of its `model`."""
    pixels, side = model.get("max_pixels", math.inf), model.get("max_side", math.inf)
    scale = min(1.0, math.sqrt(pixels / (height * width)), side / max(height, width))
    return int(height * scale + ROUNDING), int(width * scale + ROUNDING)


def untaught(
    url: str,
    prompt: str,
    height: int,
    width: int,
    choice: str | None,
    *,
    model: str | None = None,
    token: str | None = None,
) -> tuple[list[str], dict[str, Any], str]:
    """Words of the prompt that the model of the server at `url` was never taught, what the server
    shows of its card, and what is to be said against the work size `choice` for frames of this
    size."""
    told = served_model(url, model, token=token)
    card: dict[str, Any] = told.get("card", {})
    strange = unknown_words(prompt, card.get("words", ()))
    return strange, card, unlike_taught(told, height, width, choice)


def unlike_taught(model: dict[str, Any], height: int, width: int, choice: str | None) -> str:
    """What is to be said against the work size `choice`, null the server's, for its `model`."""
    own = model["height"], model["width"]
    frame = within(height, width, model)
    work = work_size_in_pixels(choice or model.get("work_size", "full"), *frame, own)
    trained = model.get("card", {}).get("trained_at") or [in_words(own)]
    return unlike_training(work, [in_pixels(size) for size in trained])


def film_file(
    url: str,
    source: Path,
    output: Path,
    prompt: str,
    *,
    progress: Callable[[int], None] = lambda frames: None,
) -> CameraReport:
    """Stream `source` as a camera would, at its frame rate, and write what comes back.

    Where the server dropped frames another edited one stands, so that the result is as long.
    Raises UserError when the server ends the stream.
    """
    info = probe(source)
    images = [codec.encode(frame, "jpeg") for frame in read_frames(source, fps=info.fps)]
    fps = float(info.fps)
    load = CameraLoad(width=info.width, height=info.height, fps=fps, seconds=len(images) / fps)
    written, last = 0, np.zeros((info.height, info.width, 3), np.uint8)
    with VideoWriter(output, info.width, info.height, info.fps) as writer:

        def show(frame: EditedFrame) -> None:
            nonlocal written, last
            last = frame.pixels
            for _ in range(frame.index + 1 - written):
                writer.write(last[None])
            written = frame.index + 1
            progress(written)

        report = asyncio.run(camera(url, load, images, prompt, on_frame=show))
        if report.error is not None:
            raise UserError(f"{url}: the stream ended: {report.error}")
        for _ in range(len(images) - written):
            writer.write(last[None])
    return report


def live_numbers(report: CameraReport) -> dict[str, float]:
    """What a viewer felt; a number that too few chunks came for is missing."""
    interval = np.mean(report.interval_ms) if report.interval_ms else None
    latency = percentile(report.latency_ms, 50)
    numbers = {
        "edited": report.edited,
        "dropped": report.dropped,
        "first_chunk_s": report.first_chunk_ms and report.first_chunk_ms / 1000,
        "latency_s": latency and latency / 1000,
        "fps": interval and 1000 / interval,
    }
    return {name: float(value) for name, value in numbers.items() if value is not None}
