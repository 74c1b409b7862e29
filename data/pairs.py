"""Real editing pairs: a list of instruction, source and edited video.

    [{"instruction": "make the car red", "source_path": "a.mp4", "edited_path": "a_red.mp4"}, ...]

as JSON, or one object a line (JSON Lines). Relative paths count from the list. Every pair is
resampled to one frame rate and cut to one size around its centre. A pair that cannot be used is
left out and reported by name and reason; it is never stretched, padded or replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from data.sample import Pair
from data.video import VideoError, VideoInfo, probe, read_frames
from data.video.source.colour import usual_matrix
from infra.runtime.errors import UserError

__all__ = ["LeftOut", "Pair", "PairList", "PairListError", "PairReader", "estimate_mask"]

ASPECT_TOLERANCE = 0.02  # beyond it source and edit would be cut to different parts of the scene
MASK_THRESHOLD = 20  # of 255: above the noise of two separate lossy encodings
PATHS = ("source_path", "edited_path")
WANTED = ("instruction", *PATHS)


class PairListError(UserError):
    """A list of pairs that cannot be used at all."""


@dataclass(frozen=True)
class LeftOut:
    """One entry that was not used; `path` is the file at fault, or the list itself."""

    index: int
    path: str
    reason: str

    def __str__(self) -> str:
        return f"entry {self.index}: {self.path}: {self.reason}"


class _UnusableError(Exception):
    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class PairReader:
    """Makes pairs of entries; crosses processes and machines that see the same files."""

    list_path: Path
    fps: float
    frames: int
    size: tuple[int, int]  # height, width

    def __call__(self, index: int, entry: Any) -> Pair | LeftOut:
        try:
            return self._read(index, entry)
        except _UnusableError as error:
            return LeftOut(index, str(error.path), error.reason)

    def _read(self, index: int, entry: Any) -> Pair:
        if not isinstance(entry, dict):
            raise _UnusableError(self.list_path, f"is {type(entry).__name__}, not an object")
        for key in WANTED:
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise _UnusableError(self.list_path, f"{key} is missing, empty or not text")
        folder = self.list_path.parent
        paths = [folder / entry[key] for key in PATHS]
        infos = [self._probe(path) for path in paths]
        mismatch = _mismatch(*infos)
        if mismatch:
            raise _UnusableError(paths[1], mismatch)
        matrix = _matrix(*infos)
        source, target = (self._clip(path, matrix) for path in paths)
        return Pair(
            source=source,
            target=target,
            mask=estimate_mask(source, target),
            instruction=entry["instruction"].strip(),
            fps=float(self.fps),
            origin={
                "list": self.list_path.name,
                "entry": index,
                "source_path": entry["source_path"],
                "edited_path": entry["edited_path"],
                "mask": "estimated",
            },
        )

    def _probe(self, path: Path) -> VideoInfo:
        try:
            return probe(path)
        except VideoError as error:
            raise _UnusableError(path, str(error).removeprefix(f"{path}: ")) from error

    def _clip(self, path: Path, matrix: int) -> np.ndarray:
        try:
            frames = list(
                read_frames(path, fps=self.fps, size=self.size, count=self.frames, untagged=matrix)
            )
        except (ValueError, av.FFmpegError, MemoryError) as error:
            # Whatever a decoder makes of one file, the others are to be read.
            raise _UnusableError(path, str(error).removeprefix(f"{path}: ")) from error
        if len(frames) < self.frames:
            raise _UnusableError(
                path, f"too short: {len(frames)} frames at {self.fps:g} fps, {self.frames} needed"
            )
        return np.stack(frames)


class PairList:
    """Iterates over the usable pairs of a list; `left_out` grows with those that are not.

    Args:
        path: The list.
        fps, frames, height, width: What every pair becomes: its first `frames` frames at `fps`.

    Raises:
        PairListError: the file is missing, or is not such a list.
    """

    def __init__(
        self, path: str | Path, *, fps: float, frames: int, height: int, width: int
    ) -> None:
        self.path = Path(path)
        self.read = PairReader(self.path, fps, frames, (height, width))
        self.left_out: list[LeftOut] = []
        self.entries = _entries(self.path)

    def __len__(self) -> int:
        """Entries in the list, usable or not."""
        return len(self.entries)

    def __iter__(self) -> Iterator[Pair]:
        self.left_out.clear()
        for index, entry in enumerate(self.entries):
            pair = self.read(index, entry)
            if isinstance(pair, LeftOut):
                self.left_out.append(pair)
            else:
                yield pair


def _entries(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except OSError as error:
        raise PairListError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise PairListError(f"{path}: is not text in UTF-8 ({error}); save it as UTF-8") from error
    try:
        entries = json.loads(text)
    except ValueError as error:
        entries = _lines(path, text, error)
    if isinstance(entries, dict) and entries.keys() >= set(WANTED):
        entries = [entries]  # JSON Lines of one line
    if not isinstance(entries, list) or not entries:
        raise PairListError(
            f"{path}: must be a JSON list of objects with instruction, source_path and "
            f"edited_path, got {type(entries).__name__} of {len(entries)}"
            if isinstance(entries, list | dict)
            else f"{path}: must be a JSON list, got {type(entries).__name__}"
        )
    return entries


def _lines(path: Path, text: str, error: ValueError) -> list[Any]:
    """JSON Lines; raises PairListError for text that is neither this nor JSON."""
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) < 2 or not all(line.lstrip().startswith("{") for _, line in lines[:2]):
        raise PairListError(f"{path}: is not JSON ({error}); see data/README.md") from error
    entries = []
    for number, line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError as wrong:
            raise PairListError(f"{path}: line {number} is not JSON ({wrong})") from wrong
    return entries


def _mismatch(source: VideoInfo, edited: VideoInfo) -> str | None:
    ratio = (edited.width / edited.height) / (source.width / source.height)
    if abs(ratio - 1) > ASPECT_TOLERANCE:
        return (
            f"shape {edited.width}x{edited.height} is not that of its source, "
            f"{source.width}x{source.height}"
        )
    return None


def _matrix(source: VideoInfo, edited: VideoInfo) -> int:
    """What untagged colours of either are read as, so that both are told by one rule.

    The tag of the one that has one, else what the larger of the two is usually made with.
    """
    stated = [info.matrix for info in (source, edited) if info.matrix]
    larger = max(source, edited, key=lambda info: info.width * info.height)
    return stated[0] if stated else usual_matrix(larger.width, larger.height)


def estimate_mask(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where two videos differ by more than the noise of their encodings, bool `[F, H, W]`.

    The largest channel's difference, averaged over 3x3 pixels, against MASK_THRESHOLD.
    """
    difference = np.abs(source.astype(np.int16) - target).max(axis=-1)
    padded = np.pad(difference, ((0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = difference.shape[1:]
    near = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.stack(near).sum(axis=0, dtype=np.int32) > 9 * MASK_THRESHOLD
