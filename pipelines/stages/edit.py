"""Edit a video file from beginning to end, in memory that does not grow with its length.

Decode, editor and encode are one chain of generators: a chunk is decoded, edited and written
before the next one is read. Frame rate, length, size and audio stay as they are in the source.
`edit_video` edits with a model of this process; `edit_file` is the same around any editor.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.video import VideoInfo, VideoWriter, probe, read_frames

if TYPE_CHECKING:
    from modeling.editor import StreamingEditor

_GRID = 16  # pixels; the transformer's patches on the VAE's latents


@dataclass(frozen=True)
class EditReport:
    """What an edit was."""

    frames: int
    seconds: float
    height: int  # size the model worked at
    width: int
    recomputed: float  # mean share of tokens computed anew

    @property
    def fps(self) -> float:
        return self.frames / self.seconds


def edit_video(
    editor: StreamingEditor,
    source: Path,
    output: Path,
    prompt: str,
    *,
    size: str = "native",
    seed: int = 0,
    side_by_side: bool = False,
    progress: Callable[[int], None] = lambda frames: None,
) -> EditReport:
    """Edit `source` as `prompt` says into `output`; `progress` hears of every edited frame count.

    `output` appears when it is complete, or not at all. Raises ValueError (VideoError for a file).
    """
    check_edit(source, output, prompt)
    info = probe(source)
    stream_config = editor.config.stream
    height, width = model_size(size, info, (stream_config.height, stream_config.width))
    stream = editor.open(prompt, height=height, width=width, seed=seed)
    shares: list[float] = []

    def edit(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in frames:
            for chunk in stream.push(frame[None]):
                shares.append(chunk.recomputed)
                yield from chunk.frames
        last = stream.flush()
        if last is not None:
            shares.append(last.recomputed)
            yield from last.frames

    started = time.monotonic()
    done = edit_file(
        edit, source, output, (height, width), side_by_side=side_by_side, progress=progress
    )
    seconds = time.monotonic() - started
    return EditReport(done, seconds, height, width, float(np.mean(shares)))


def edit_file(
    edit: Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]],
    source: Path,
    output: Path,
    size: tuple[int, int],
    *,
    side_by_side: bool = False,
    progress: Callable[[int], None] = lambda frames: None,
) -> int:
    """Run the frames of `source` through `edit` into `output`; returns how many there were.

    `edit` is given frames of `size` (height, width), uint8 [H, W, 3], and gives as many back, in
    order; it may take them in another thread.
    """
    info = probe(source)
    waiting: deque[np.ndarray] = deque()  # source frames under way, for side_by_side

    def read() -> Iterator[np.ndarray]:
        # By time stamps: a variable rate becomes its mean, and the sound stays with the picture.
        for frame in read_frames(source, fps=info.fps):
            if side_by_side:
                waiting.append(frame)
            yield resize(frame, *size)

    done = 0
    columns = 2 if side_by_side else 1
    with VideoWriter(output, columns * info.width, info.height, info.fps, audio_from=source) as out:
        for frame in edit(read()):
            picture = resize(frame, info.height, info.width)
            if side_by_side:
                picture = np.concatenate([waiting.popleft(), picture], axis=1)
            out.write(picture[None])
            done += 1
            progress(done)
    return done


def check_edit(source: Path, output: Path, prompt: str) -> None:
    """Raise a ValueError for what needs no model to be seen."""
    if not prompt.strip():
        raise ValueError('the prompt is empty; say what to change, e.g. --prompt "make it snow"')
    if output.exists() and source.exists() and output.samefile(source):
        raise ValueError(f"{output} is the source itself; give another output file")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}; make it first")


def model_size(size: str, info: VideoInfo, trained: tuple[int, int]) -> tuple[int, int]:
    """(height, width) the model works at: `native`, `source` or `HxW`.

    `native` keeps the source's aspect and the area the model was trained at, in steps of 16.
    """
    if size == "source":
        return info.height, info.width
    if size == "native":
        scale = math.sqrt(trained[0] * trained[1] / (info.height * info.width))
        return (
            max(_GRID, round(info.height * scale / _GRID) * _GRID),
            max(_GRID, round(info.width * scale / _GRID) * _GRID),
        )
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match or min(int(match[1]), int(match[2])) < _GRID:
        raise ValueError(
            f"--size {size} is not a size; write native, source, or height x width such as 480x832 "
            f"(at least {_GRID}x{_GRID})"
        )
    return int(match[1]), int(match[2])


def resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """`frame` (uint8 [H, W, 3]) at another size; the same array if it has that size already."""
    if frame.shape[:2] == (height, width):
        return frame
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def expected_frames(info: VideoInfo) -> int:
    """How many frames the edit will have, for a progress bar."""
    return max(1, info.frames or round(info.duration * info.fps))
