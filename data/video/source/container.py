"""Opening video files that nobody has looked at yet.

Only kinds of file that hold a video themselves are opened: playlists, lists of other files, devices
and addresses are not, whatever the file's name or content says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av

from data.video.errors import VideoError, file_name, reason
from data.video.source.boxes import index_lie

Source = str | Path | BinaryIO
InputContainer = av.container.InputContainer

REMEDY = "check that it plays, or convert it, for example `ffmpeg -i IN -c:v libx264 OUT.mp4`"
# FFmpeg's demuxers by name. Left out on purpose: concat, hls, dash, image2, lavfi, sdp, rtsp and
# all others that go and open something else. Those of sound alone are here so that the error says
# what is missing.
FORMATS = (
    "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "vvc",
    "av1", "obu", "ivf", "flv", "live_flv", "asf", "ogg", "gif", "apng", "webp", "mjpeg", "mxf",
    "dv", "gxf", "nut", "rm", "wtv", "yuv4mpegpipe", "vc1", "dirac", "nsv", "h261", "h263", "mods",
    "wav", "w64", "mp3", "aac", "flac", "aiff", "caf",
)  # fmt: skip
MAX_SIDE, MAX_PIXELS = 16384, 8192 * 8192
DEMUX_ERRORS = 100  # in a row without a packet: the rest is taken for unreadable


def file_url(path: str | Path) -> str:
    """The path as FFmpeg must be told it: a name such as 12:30:45.mp4 is no protocol."""
    return f"file:{path}"


def open_video(path: Source) -> InputContainer:
    """Raises VideoError when `path` is missing or is not a video file of a kind in FORMATS."""
    if isinstance(path, str | Path):
        if not Path(path).exists():
            raise VideoError(f"{path}: no such file; check the path")
        if not Path(path).is_file():
            raise VideoError(f"{path}: is no file; give a video file")
    lie = _index_lie(path)
    if lie is not None:
        raise VideoError(f"{file_name(path)}: not a readable video ({lie}); {REMEDY}")
    try:
        return av.open(
            file_url(path) if isinstance(path, str | Path) else path,
            "r",
            options={"format_whitelist": ",".join(FORMATS), "max_pixels": str(MAX_PIXELS)},
            metadata_errors="replace",
        )
    except (av.FFmpegError, OSError, UnicodeError) as error:
        raise VideoError(
            f"{file_name(path)}: not a readable video ({_why(error)}); {REMEDY}"
        ) from error


def _index_lie(path: Source) -> str | None:
    if not isinstance(path, str | Path):
        lie = index_lie(path)
        path.seek(0)
        return lie
    try:
        with open(path, "rb") as file:
            return index_lie(file)
    except OSError as error:
        raise VideoError(f"{path}: not a readable video ({reason(error)}); {REMEDY}") from error


def _why(error: Exception) -> str:
    # FFmpeg answers so for a kind of file that is not in FORMATS.
    if isinstance(error, av.error.ArgumentError):
        return "of a kind that is not read here, such as a playlist, or damaged"
    return reason(error)


def video_stream(container: InputContainer, path: Source) -> Any:
    """The stream that a player would show. Raises VideoError."""
    shown = [s for s in container.streams.video if not is_picture(s)]
    if not shown:
        raise VideoError(f"{file_name(path)}: has no video stream; give a file with pictures")
    stream = first_shown(shown)
    if stream.codec_context is None:
        raise VideoError(f"{file_name(path)}: its video codec is unknown to this ffmpeg; {REMEDY}")
    width, height = stream.codec_context.width, stream.codec_context.height
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoError(
            f"{file_name(path)}: frames of {width}x{height} are more than the {MAX_PIXELS} pixels "
            "that are read here; scale it first, for example `ffmpeg -i IN -vf scale=3840:-2 OUT`"
        )
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def first_shown(streams: list[Any]) -> Any:
    default = av.stream.Disposition.default
    return next((s for s in streams if s.disposition & default), streams[0])


def is_picture(stream: Any) -> bool:
    """Whether a video stream is the cover picture of a file."""
    pictures = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    return bool(stream.disposition & pictures)


def packets(container: InputContainer, streams: list[Any]) -> Iterator[Any]:
    """Packets in the file's order, past places that cannot be read; the empty ones at the end too.

    A file that ends in the middle of a packet ends there.
    """
    errors = 0
    while True:
        try:
            for packet in container.demux(streams):
                errors = 0
                yield packet
            return
        except (av.FFmpegError, OSError):
            errors += 1
            if errors == DEMUX_ERRORS:
                return
