"""The error of everything that reads or writes a video."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from infra.runtime.errors import UserError


class VideoError(UserError):
    """A video that cannot be read or written; the message names the file and the remedy."""


def file_name(file: Any) -> str:
    """How messages name a path or an open file."""
    return str(file) if isinstance(file, str | Path) else str(getattr(file, "name", "video stream"))


def reason(error: Exception) -> str:
    """The system's or ffmpeg's own words, without the path they add."""
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def writing(name: str) -> Iterator[None]:
    """Turns what PyAV and the system raise while `name` is written into a VideoError."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise VideoError(f"{name}: the disk is full; free space and write again") from error
        raise VideoError(f"{name}: cannot be written ({reason(error)})") from error
