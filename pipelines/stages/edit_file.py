"""Edit a video file from beginning to end, in memory that does not grow with its length.

Decode, editor and encode are one chain of generators: a chunk is decoded, edited and written
before the next one is read. Every stored frame is edited once and keeps its time; length, size,
sound and the other tracks stay as they are in the source, or `data.video.differences` says what
does not.
`edit_video` edits with a model of this process; `edit_file` is the same around any editor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np
from PIL import Image

from data.video import Damage, VideoError, VideoInfo, VideoWriter, probe, read_timed
from data.video.output import check_output
from infra.runtime.errors import UserError

if TYPE_CHECKING:
    from modeling.editor import StreamingEditor
    from modeling.streaming.picture import Detail


# Frames uint8 [H, W, 3] in, as many out, in order; it may take them in another thread.
EditFrames = Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]]


@dataclass(frozen=True)
class EditReport:
    """What an edit was."""

    frames: int
    seconds: float
    height: int  # size the model worked at
    width: int
    recomputed: float  # mean share of tokens computed anew
    damage: Damage = field(default_factory=Damage)  # of the source

    @property
    def fps(self) -> float:
        return self.frames / self.seconds


class FileOptions(TypedDict, total=False):
    """How a file is read and written, whoever edits its frames."""

    fps: Fraction | float | None  # a constant rate instead of each frame's own time
    strict: bool  # damage of the source is an error
    side_by_side: bool  # source and edit next to each other
    progress: Callable[[int], None]  # hears of every edited frame count


def edit_video(
    editor: StreamingEditor,
    source: Path,
    output: Path,
    prompt: str,
    *,
    work_size: str = "native",
    detail: Detail = "source",
    seed: int = 0,
    **options: Unpack[FileOptions],
) -> EditReport:
    """Edit `source` as `prompt` says into `output`, which appears complete or not at all.

    The model works at `work_size` (`modeling.detail.work_size`), and with `detail` "source" what it
    makes keeps the source's detail. Raises UserError (VideoError for a file).
    """
    check_edit(source, output, prompt)
    info = probe(source)
    size = info.height, info.width
    stream = editor.open(
        prompt, height=size[0], width=size[1], seed=seed, work_size=work_size, detail=detail
    )
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

    return reported(edit, source, output, size, shares, work=stream.work, **options)


def reported(
    edit: EditFrames,
    source: Path,
    output: Path,
    size: tuple[int, int],
    shares: list[float],
    work: tuple[int, int],
    **options: Unpack[FileOptions],
) -> EditReport:
    """`edit_file`, timed; `shares` are the chunks' shares of recomputed tokens, which `edit`
    fills, and `work` is the size (height, width) that the model works at."""
    damage, started = Damage(), time.monotonic()
    done = edit_file(edit, source, output, size, damage=damage, **options)
    seconds = time.monotonic() - started
    return EditReport(done, seconds, *work, float(np.mean(shares)), damage)


def edit_file(
    edit: EditFrames,
    source: Path,
    output: Path,
    size: tuple[int, int],
    *,
    fps: Fraction | float | None = None,
    strict: bool = False,
    damage: Damage | None = None,
    side_by_side: bool = False,
    progress: Callable[[int], None] = lambda frames: None,
) -> int:
    """Run the frames of `source` through `edit` into `output`; returns how many there were.

    `size` (height, width) is that of the frames that `edit` is given. `damage` counts what could
    not be read. See `FileOptions` for the others.
    """
    info = probe(source)
    damage = Damage() if damage is None else damage
    waiting: deque[tuple[Fraction, np.ndarray | None]] = deque()  # frames that are being edited

    def read() -> Iterator[np.ndarray]:
        for time, frame in read_timed(source, fps=fps, damage=damage, strict=strict):
            waiting.append((time, frame if side_by_side else None))
            yield resize(frame, *size)

    done = 0
    with VideoWriter(
        output,
        info.width * (2 if side_by_side else 1),
        info.height,
        fps or info.bulk_fps or info.fps,
        audio_from=source,
        tick=info.tick if fps is None else None,
        damage=damage,
    ) as out:
        for frame in edit(read()):
            time, original = waiting.popleft()
            picture = resize(frame, info.height, info.width)
            if original is not None:
                picture = np.concatenate([original, picture], axis=1)
            out.write(picture[None], [time])
            done += 1
            progress(done)
        if strict and damage:
            raise VideoError(f"{source}: is damaged: {damage}; without --strict it is edited so")
    return done


def check_edit(source: Path, output: Path, prompt: str) -> None:
    """Raise a UserError for what needs no model to be seen."""
    if not prompt.strip():
        raise UserError('the prompt is empty; say what to change, e.g. --prompt "make it snow"')
    if output.exists() and source.exists() and output.samefile(source):
        raise UserError(f"{output} is the source itself; give another output file")
    check_output(output)


def resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """`frame` (uint8 [H, W, 3]) at another size; the same array if it has that size already."""
    if frame.shape[:2] == (height, width):
        return frame
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def expected_frames(info: VideoInfo, fps: Fraction | float | None = None) -> int:
    """How many frames the edit will have, for a progress bar."""
    stored = info.frames if fps is None else None
    return max(1, stored or round(info.duration * (fps or info.fps)))
