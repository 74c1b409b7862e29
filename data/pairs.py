"""Real editing pairs: a JSON list of instruction, source and edited video.

    [{"instruction": "make the car red", "source_path": "a.mp4", "edited_path": "a_red.mp4"}, ...]

Relative paths count from the JSON file. Every pair is resampled to one frame rate and cut to one
size around its centre. A pair that cannot be used is left out and reported by name and reason; it
is never stretched, padded or replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.sample import Pair
from data.video import VideoError, VideoInfo, probe, read_frames

__all__ = ["LeftOut", "Pair", "PairList", "PairListError", "estimate_mask"]

ASPECT_TOLERANCE = 0.02  # beyond it source and edit would be cut to different parts of the scene
MASK_THRESHOLD = 20  # of 255: above the noise of two separate lossy encodings


class PairListError(ValueError):
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


class PairList:
    """Iterates over the usable pairs of a list; `left_out` grows with those that are not.

    Args:
        path: The JSON file.
        fps, frames, height, width: What every pair becomes: its first `frames` frames at `fps`.

    Raises:
        PairListError: the file is missing, or is not a JSON list.
    """

    def __init__(
        self, path: str | Path, *, fps: float, frames: int, height: int, width: int
    ) -> None:
        self.path = Path(path)
        self.fps, self.frames, self.size = fps, frames, (height, width)
        self.left_out: list[LeftOut] = []
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PairListError(
                f"{path}: cannot be read ({error.strerror}); check the path"
            ) from error
        except ValueError as error:
            raise PairListError(f"{path}: is not JSON ({error}); see data/README.md") from error
        if not isinstance(entries, list) or not entries:
            raise PairListError(
                f"{path}: must be a JSON list of objects with instruction, source_path and "
                f"edited_path, got {type(entries).__name__} of {len(entries)}"
                if isinstance(entries, list | dict)
                else f"{path}: must be a JSON list, got {type(entries).__name__}"
            )
        self.entries = entries

    def __len__(self) -> int:
        """Entries in the list, usable or not."""
        return len(self.entries)

    def __iter__(self) -> Iterator[Pair]:
        self.left_out.clear()
        for index, entry in enumerate(self.entries):
            try:
                pair = self._read(index, entry)
            except _UnusableError as error:
                self.left_out.append(LeftOut(index, str(error.path), error.reason))
            else:
                yield pair

    def _read(self, index: int, entry: Any) -> Pair:
        wanted = ("instruction", "source_path", "edited_path")
        if not isinstance(entry, dict):
            raise _UnusableError(self.path, f"is {type(entry).__name__}, not an object")
        for key in wanted:
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise _UnusableError(self.path, f"{key} is missing, empty or not text")
        paths = [self.path.parent / entry["source_path"], self.path.parent / entry["edited_path"]]
        clips, infos = [], []
        for path in paths:
            try:
                infos.append(probe(path))
                clips.append(self._clip(path))
            except VideoError as error:
                raise _UnusableError(path, str(error).removeprefix(f"{path}: ")) from error
            if len(clips[-1]) < self.frames:
                raise _UnusableError(
                    path,
                    f"too short: {len(clips[-1])} frames at {self.fps:g} fps, {self.frames} needed",
                )
        mismatch = self._mismatch(*infos)
        if mismatch:
            raise _UnusableError(paths[1], mismatch)
        source, target = clips
        return Pair(
            source=source,
            target=target,
            mask=estimate_mask(source, target),
            instruction=entry["instruction"].strip(),
            fps=float(self.fps),
            origin={
                "list": self.path.name,
                "entry": index,
                "source_path": entry["source_path"],
                "edited_path": entry["edited_path"],
                "mask": "estimated",
            },
        )

    def _clip(self, path: Path) -> np.ndarray:
        frames = list(read_frames(path, fps=self.fps, size=self.size, count=self.frames))
        return np.stack(frames)

    def _mismatch(self, source: VideoInfo, edited: VideoInfo) -> str | None:
        ratio = (edited.width / edited.height) / (source.width / source.height)
        if abs(ratio - 1) > ASPECT_TOLERANCE:
            return (
                f"shape {edited.width}x{edited.height} is not that of its source, "
                f"{source.width}x{source.height}"
            )
        # Both must show the same time: one frame of either rate is the rounding of an encoder.
        slack = 1 / min(float(source.fps), float(edited.fps), float(self.fps)) * 1.5
        if abs(source.duration - edited.duration) > slack:
            return f"lasts {edited.duration:.2f} s, its source {source.duration:.2f} s"
        return None


def estimate_mask(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where two videos differ by more than the noise of their encodings, bool `[F, H, W]`.

    The largest channel's difference, averaged over 3x3 pixels, against MASK_THRESHOLD.
    """
    difference = np.abs(source.astype(np.int16) - target).max(axis=-1)
    padded = np.pad(difference, ((0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = difference.shape[1:]
    near = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.stack(near).sum(axis=0, dtype=np.int32) > 9 * MASK_THRESHOLD
