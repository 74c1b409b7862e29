"""Videos into frames: any codec, frame rate, aspect and rotation, in bounded memory.

`probe` says what a file is, `read_frames` decodes it frame by frame. Both give the picture as a
player shows it: turned by the rotation of its metadata, with square pixels. `VideoWriter` is the
way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from data.video_errors import VideoError, file_name, reason
from data.video_writer import VideoWriter

__all__ = ["VideoError", "VideoInfo", "VideoWriter", "probe", "read_frames"]

Source = str | Path | BinaryIO

# Chroma at full resolution and exact rounding cost 10 to 20 % of the conversion and keep coloured
# edges where they are.
EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
MAX_FPS = 1000
# Of a frame's time: a frame that comes so little late still counts. Containers round their time
# stamps (Matroska to milliseconds): an exact comparison would repeat one frame and drop the next.
SLACK = Fraction(1, 4)


@dataclass(frozen=True)
class VideoInfo:
    """What a player would show; sizes in pixels, after rotation and with square pixels."""

    width: int
    height: int
    fps: Fraction  # mean rate when the file's rate varies
    frames: int | None  # as the container states it; None when it does not
    duration: float  # seconds of video
    has_audio: bool
    codec: str
    rotation: int  # degrees counter-clockwise, already applied to width and height


def probe(path: Source) -> VideoInfo:
    """Reads what the file says about itself, decoding one frame only.

    Raises:
        VideoError: no such file, not a video, or no frame can be decoded.
    """
    with _open(path) as container:
        stream = _video_stream(container, path)
        fps = _frame_rate(stream, path)
        first = next(_decode(container, stream, path), None)
        if first is None:
            raise VideoError(f"{file_name(path)}: has a video stream but no frame; {_REMEDY}")
        width, height = _shown_size(first, stream)
        return VideoInfo(
            width=width,
            height=height,
            fps=fps,
            frames=stream.frames or None,
            duration=_duration(container, stream, fps),
            has_audio=bool(container.streams.audio),
            codec=stream.codec_context.name,
            rotation=first.rotation,
        )


def read_frames(
    path: Source,
    *,
    fps: Fraction | float | None = None,
    size: tuple[int, int] | None = None,
    start: int = 0,
    count: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields frames, uint8 RGB `[height, width, 3]`, holding a few of them in memory at a time.

    Args:
        path: A file, or an open binary file that can seek.
        fps: Frames a second to give, chosen by time stamps, so right for variable rates too: at
            each tick the frame on the screen then. None gives every stored frame once.
        size: `(height, width)`. The picture is scaled until it covers the size and cut around its
            centre, never stretched. None keeps the shown size.
        start: First frame to give, counted in frames of the result.
        count: Frames to give; fewer come if the video ends before.

    Raises:
        VideoError: names the file and what is wrong, also for damage met on the way.
    """
    if start < 0 or (count is not None and count < 0):
        raise ValueError(f"start and count must not be negative, got {start} and {count}")
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps must lie in (0, {MAX_FPS}], got {fps}")
    if count == 0:
        return
    with _open(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        frames = _decode(container, stream, path)
        ticks = ((f, 1) for f in frames) if fps is None else _resample(frames, stream, fps, path)
        scale = _Scaler(size, stream)
        end = None if count is None else start + count
        position = 0  # of the next frame of the result
        for frame, repeats in ticks:
            first = max(start, position)
            last = position + repeats if end is None else min(end, position + repeats)
            if first < last:
                picture = scale(frame)
                for n in range(first, last):
                    yield picture if n == last - 1 else picture.copy()
            position += repeats
            if end is not None and position >= end:
                return
        if position == 0:
            raise VideoError(f"{file_name(path)}: has a video stream but no frame; {_REMEDY}")


_REMEDY = "check that it plays, or convert it, for example `ffmpeg -i IN -c:v libx264 OUT.mp4`"


def _open(path: Source) -> av.container.InputContainer:
    try:
        return av.open(str(path) if isinstance(path, str | Path) else path, "r")
    except FileNotFoundError as error:
        raise VideoError(f"{file_name(path)}: no such file; check the path") from error
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"{file_name(path)}: not a readable video ({reason(error)}); {_REMEDY}"
        ) from error


def _video_stream(container: av.container.InputContainer, path: Source) -> Any:
    # Cover pictures of sound files are video streams too: skip them.
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                raise VideoError(
                    f"{file_name(path)}: its video codec is unknown to this ffmpeg; {_REMEDY}"
                )
            return stream
    raise VideoError(f"{file_name(path)}: has no video stream; give a file with pictures")


def _decode(
    container: av.container.InputContainer, stream: Any, path: Source
) -> Iterator[av.VideoFrame]:
    number = 0
    try:
        for frame in container.decode(stream):
            yield frame
            number += 1
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"{file_name(path)}: damaged after frame {number} ({reason(error)}); {_REMEDY}"
        ) from error


def _frame_rate(stream: Any, path: Source) -> Fraction:
    """Nominal rate, or the mean where the nominal one is a time base rather than a rate."""
    mean, nominal = stream.average_rate, stream.guessed_rate
    rate = nominal if not mean or (nominal and abs(nominal - mean) < mean / 100) else mean
    if not rate or rate <= 0:
        raise VideoError(f"{file_name(path)}: states no frame rate; {_REMEDY}")
    return Fraction(min(rate, MAX_FPS)).limit_denominator(100_000)


def _duration(container: av.container.InputContainer, stream: Any, fps: Fraction) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    container.seek(
        0
    )  # a container that states none (Matroska): read the time stamps of all packets
    first = last = None
    for packet in container.demux(stream):
        if packet.pts is not None:
            first = packet.pts if first is None else min(first, packet.pts)
            last = packet.pts if last is None else max(last, packet.pts)
    return 0.0 if first is None else float((last - first) * stream.time_base + 1 / fps)


def _resample(
    frames: Iterator[av.VideoFrame], stream: Any, fps: Fraction | float, path: Source
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Pairs each frame that is shown at all with how many ticks of `fps` it is shown."""
    fps = Fraction(fps).limit_denominator(100_000)
    source_step = 1 / _frame_rate(stream, path)
    slack = SLACK * min(Fraction(1), source_step * fps)
    origin: Fraction | None = None
    held: av.VideoFrame | None = None
    held_tick, end = 0, Fraction(0)
    for number, frame in enumerate(frames):
        base = Fraction(frame.time_base or 0)
        time = number * source_step if frame.pts is None else frame.pts * base
        origin = time if origin is None else origin
        tick = math.ceil((time - origin) * fps - slack)
        if held is not None and tick > held_tick:
            yield held, tick - held_tick
            held_tick = tick
        held = frame
        end = time - origin + (frame.duration * base or source_step)
    ticks = max(1, round(end * fps))
    if held is not None and held_tick < ticks:
        yield held, ticks - held_tick


def _pixel_aspect(stream: Any) -> Fraction:
    aspect = stream.sample_aspect_ratio
    return Fraction(aspect) if aspect and aspect > 0 else Fraction(1)


def _shown_size(frame: av.VideoFrame, stream: Any) -> tuple[int, int]:
    width, height = max(1, round(frame.width * _pixel_aspect(stream))), frame.height
    return (height, width) if frame.rotation % 180 else (width, height)


class _Scaler:
    """Decoded frame to RGB of one size; keeps swscale's context between frames."""

    def __init__(self, size: tuple[int, int] | None, stream: Any) -> None:
        if size is not None and min(size) < 1:
            raise ValueError(f"size must be (height, width) of at least one pixel, got {size}")
        self.size, self.stream = size, stream
        self.reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        shown_w, shown_h = _shown_size(frame, self.stream)
        if self.size is None:  # a file may change its size on the way: the first frame decides
            self.size = (shown_h, shown_w)
        out_h, out_w = self.size
        ratio = max(Fraction(out_w, shown_w), Fraction(out_h, shown_h))
        cover_w, cover_h = max(out_w, round(shown_w * ratio)), max(out_h, round(shown_h * ratio))
        turned = frame.rotation % 180 != 0
        width, height = (cover_h, cover_w) if turned else (cover_w, cover_h)
        shrinks = ratio < 1
        picture = self.reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation=(Interpolation.AREA if shrinks else Interpolation.BICUBIC) | EXACT,
            dst_color_range="JPEG",
            threads=1,
        ).to_ndarray()
        picture = np.rot90(picture, round(frame.rotation / 90) % 4)
        top, left = (cover_h - out_h) // 2, (cover_w - out_w) // 2
        return np.ascontiguousarray(picture[top : top + out_h, left : left + out_w])
