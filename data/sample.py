"""What a dataset is made of, and how one sample becomes files of a shard and comes back.

Kept apart from the shards so that worker processes start without torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from data.video import VideoWriter, read_own


@dataclass(frozen=True)
class Pair:
    """A video before and after an edit, and the instruction that leads from one to the other."""

    source: np.ndarray  # uint8 [F, H, W, 3]
    target: np.ndarray  # uint8 [F, H, W, 3]
    mask: np.ndarray  # bool [F, H, W], True where an edit changes the picture
    instruction: str
    fps: float
    origin: dict[str, Any] = field(default_factory=dict)  # where it comes from; JSON values

    @property
    def video_shape(self) -> tuple[int, int, int]:
        frames, height, width = self.source.shape[:3]
        return frames, height, width


@dataclass(frozen=True)
class EncodedPair:
    """The same in a VAE's latents, with the instruction's embedding."""

    source: np.ndarray  # float [F, 16, h, w]
    target: np.ndarray  # float [F, 16, h, w]
    text: np.ndarray  # float [L, D]
    instruction: str
    fps: float
    video_shape: tuple[int, int, int]  # frames, height, width of the video it was made from
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Clip:
    """A stretch of a pair's source or target alone, which takes a fifth of reading the pair."""

    frames: np.ndarray  # uint8 [f, H, W, 3]
    instruction: str


# Edges of saturated colour are what an edit is judged by: 4:2:0 blurs them, 4:4:4 keeps them.
CRF = 12


def to_files(sample: Pair | EncodedPair) -> dict[str, bytes]:
    """One sample as shard members, by extension."""
    about = {
        "instruction": sample.instruction,
        "fps": sample.fps,
        "video_shape": list(sample.video_shape),
        "origin": sample.origin,
    }
    files = {"json": json.dumps(about, sort_keys=True).encode()}
    if isinstance(sample, EncodedPair):
        for name in ("source", "target", "text"):
            files[f"{name}.npy"] = _npy(getattr(sample, name))
        return files
    files["source.mp4"] = _mp4(sample.source, sample.fps, CRF, "yuv444p")
    files["target.mp4"] = _mp4(sample.target, sample.fps, CRF, "yuv444p")
    files["mask.mp4"] = _mp4(sample.mask.astype(np.uint8) * 255, sample.fps, 0, "gray")
    return files


def from_files(files: Mapping[str, bytes]) -> Pair | EncodedPair:
    """The inverse. Videos come back visually lossless, masks and arrays exactly.

    Raises:
        KeyError: a member is missing.
        ValueError: a member cannot be decoded, or the parts disagree in shape.
    """
    about = json.loads(files["json"])
    frames, height, width = about["video_shape"]
    instruction, fps, origin = about["instruction"], about["fps"], about["origin"]
    if "source.npy" in files:
        source, target, text = (
            np.load(io.BytesIO(files[f"{name}.npy"]), allow_pickle=False)
            for name in ("source", "target", "text")
        )
        shape = (frames, height, width)
        return EncodedPair(source, target, text, instruction, fps, shape, origin)
    source, target, mask = (
        np.stack(list(read_own(io.BytesIO(files[f"{name}.mp4"]))))
        for name in ("source", "target", "mask")
    )
    for name, video in (("source", source), ("target", target), ("mask", mask)):
        if video.shape[:3] != (frames, height, width):
            raise ValueError(
                f"{name} is {video.shape[:3]}, its JSON says {(frames, height, width)}"
            )
    return Pair(source, target, mask[..., 0] > 127, instruction, fps, origin)


def clip_from_files(files: Mapping[str, bytes], video: str, first: int, count: int) -> Clip:
    """Frames `first` to `first + count` of `video`, source or target, of a pair's members.

    Raises:
        KeyError: a member is missing.
        ValueError: it cannot be decoded, or has not these frames in the size its JSON says.
    """
    about = json.loads(files["json"])
    _, height, width = about["video_shape"]
    frames = np.stack(list(islice(read_own(io.BytesIO(files[f"{video}.mp4"]), first), count)))
    if frames.shape[:3] != (count, height, width):
        raise ValueError(
            f"{video} from frame {first} on is {frames.shape[:3]}, its JSON says "
            f"{(count, height, width)}"
        )
    return Clip(frames, about["instruction"])


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _mp4(frames: np.ndarray, fps: float, crf: int, pixel_format: str) -> bytes:
    buffer = io.BytesIO()
    height, width = frames.shape[1:3]
    with VideoWriter(
        buffer,
        width,
        height,
        fps,
        crf=crf,
        preset="veryfast",
        pixel_format=pixel_format,
        reproducible=True,  # the same samples have the same checksums
    ) as writer:
        writer.write(frames)
    return buffer.getvalue()
