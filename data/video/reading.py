"""Frames of a video as a player shows them: upright, whole, square pixels, SDR BT.709."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import BinaryIO

import av
import numpy as np

from data.video.decode import Damage, decode
from data.video.decode import check_whole as refuse_cut_off
from data.video.errors import VideoError, file_name, reason
from data.video.source.container import Source, open_video, video_stream
from data.video.source.rate import MAX_FPS
from data.video.source.survey import Survey, survey
from data.video.source.upright import Scaler

# Of a frame's time: a frame that comes so little late still counts. Containers round their time
# stamps (Matroska to milliseconds): an exact comparison would repeat one frame and drop the next.
SLACK = Fraction(1, 4)


@dataclass(frozen=True)
class VideoInfo:
    """What a player would show; sizes in pixels, upright and with square pixels."""

    width: int
    height: int
    fps: Fraction  # mean rate when the file's rate varies
    frames: int | None  # that are in the file, whatever its header says
    duration: float  # seconds of picture
    has_audio: bool
    codec: str
    rotation: int  # degrees counter-clockwise, already applied to width and height
    bulk_fps: Fraction | None = None  # the rate of most frames; None: `fps` is
    variable: bool = False  # whether frames come at no constant rate
    matrix: int | None = None  # of the colours, by H.273; None: the file does not say
    tick: Fraction | None = None  # seconds; every frame's time is a multiple, or rounded to one


def probe(path: Source) -> VideoInfo:
    """Reads what the file holds: all its packets, decoding no frame but the first.

    Raises:
        VideoError: no such file, not a video, or no frame can be decoded.
    """
    found = survey(path)
    return VideoInfo(
        width=found.look.width,
        height=found.look.height,
        fps=found.fps,
        frames=found.packets - found.undecodable,
        duration=float(found.end - found.first),
        has_audio=found.has_audio,
        codec=found.codec,
        rotation=found.look.rotation,
        bulk_fps=found.rate.bulk,
        variable=not found.rate.constant,
        matrix=found.look.matrix,
        tick=found.tick,
    )


def check_whole(path: Source) -> None:
    """Raises VideoError for a file that is cut off, before it is read."""
    refuse_cut_off(path, survey(path))


def read_timed(
    path: Source,
    *,
    fps: Fraction | float | None = None,
    size: tuple[int, int] | None = None,
    damage: Damage | None = None,
    strict: bool = False,
) -> Iterator[tuple[Fraction, np.ndarray]]:
    """Yields (time, frame) of every stored frame, holding a few of them in memory at a time.

    Times are seconds from the beginning of what is seen and heard, increasing; the first frame's
    is above 0 when sound comes before it. Frames are uint8 RGB `[height, width, 3]`.

    Args:
        path: A file, or an open binary file that can seek.
        fps: Frames a second to give instead: at each tick the frame on the screen then.
        size: `(height, width)`. The picture is scaled until it covers the size and cut around its
            centre, never stretched. None keeps the shown size.
        damage: Counts what cannot be read.
        strict: Damage is an error.

    Raises:
        VideoError: names the file and what is wrong.
    """
    found = survey(path)
    scale = _scaler(found, size)
    for time, frame, repeats in _shown(path, found, fps, damage, strict):
        picture = scale(frame)
        for n in range(repeats):
            shown = picture if n == repeats - 1 else picture.copy()
            yield time if fps is None else time + n / _exact(fps), shown


def read_frames(
    path: Source,
    *,
    fps: Fraction | float | None = None,
    size: tuple[int, int] | None = None,
    start: int = 0,
    count: int | None = None,
    untagged: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields frames as `read_timed` does, without their times.

    Args:
        start: First frame to give, counted in frames of the result.
        count: Frames to give; fewer come if the video ends before.
        untagged: The matrix (H.273) that colours are read by when the file does not say; None
            guesses by size, as players do.

    Raises:
        VideoError: names the file and what is wrong.
    """
    if start < 0 or (count is not None and count < 0):
        raise ValueError(f"start and count must not be negative, got {start} and {count}")
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps must lie in (0, {MAX_FPS}], got {fps}")
    if count == 0:
        return
    found = survey(path)
    scale = _scaler(found, size, untagged)
    end = None if count is None else start + count
    position = 0  # of the next frame of the result
    for _, frame, repeats in _shown(path, found, fps, None, False):
        first = max(start, position)
        last = position + repeats if end is None else min(end, position + repeats)
        if first < last:
            picture = scale(frame)
            for n in range(first, last):
                yield picture if n == last - 1 else picture.copy()
        position += repeats
        if end is not None and position >= end:
            return


def read_own(file: BinaryIO, first: int = 0) -> Iterator[np.ndarray]:
    """Frames of a file that VideoWriter wrote, from `first` on, without first finding out what it
    is.

    A third less work than `read_frames`, where clips are read again and again. Raises VideoError.
    """
    with open_video(file) as container:
        stream = video_stream(container, file)
        scale = Scaler(None, Fraction(1))
        try:
            for frame in islice(container.decode(stream), first, None):
                yield scale(frame)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{file_name(file)}: is damaged ({reason(error)})") from error


def _scaler(found: Survey, size: tuple[int, int] | None, untagged: int | None = None) -> Scaler:
    # A GIF's transparent places show the page it is on.
    page = 255 if found.codec == "gif" else 0
    return Scaler(size, found.look.aspect, untagged=untagged, page=page)


def _exact(fps: Fraction | float) -> Fraction:
    return Fraction(fps).limit_denominator(100_000)


def _shown(
    path: Source, found: Survey, fps: Fraction | float | None, damage: Damage | None, strict: bool
) -> Iterator[tuple[Fraction, av.VideoFrame, int]]:
    """(time, frame, how many ticks of `fps` it is shown) of each frame that is shown at all."""
    frames = decode(path, found, damage=damage, strict=strict)
    if fps is None:
        yield from ((time, frame, 1) for time, frame in frames)
        return
    fps = _exact(fps)
    slack = SLACK * min(Fraction(1), fps / found.rate.fps)
    origin: Fraction | None = None
    held: av.VideoFrame | None = None
    held_tick = 0
    for time, frame in frames:
        origin = time if origin is None else origin
        tick = math.ceil((time - origin) * fps - slack)
        if held is not None and tick > held_tick:
            yield origin + held_tick / fps, held, tick - held_tick
            held_tick = tick
        held = frame
    if held is not None and origin is not None:
        ticks = max(1, round((time - origin + found.length) * fps))
        if held_tick < ticks:
            yield origin + held_tick / fps, held, ticks - held_tick
