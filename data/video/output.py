"""Where an edited video goes: which container, whether it can be written, under which name."""

from __future__ import annotations

import os
from pathlib import Path

from data.video.errors import VideoError

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}


def output_format(path: Path) -> str:
    """FFmpeg's name of the container that the suffix stands for. Raises VideoError."""
    if path.suffix.lower() not in FORMATS:
        raise VideoError(f"{path}: cannot hold H.264; name the file .mp4, .mov or .mkv")
    return FORMATS[path.suffix.lower()]


def check_output(path: Path) -> None:
    """Raises VideoError for a place where no video can be written; nothing is written yet."""
    if path.is_dir():
        raise VideoError(f"{path}: is a folder; name a file in it, such as {path / 'out.mp4'}")
    output_format(path)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise VideoError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VideoError(f"{path}: the folder {path.parent} cannot be written; choose another")


def part_name(path: Path) -> Path:
    """The name while it is written: beside the final one, so that it can be renamed."""
    return path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
