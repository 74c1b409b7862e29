"""What edits the clips: a model of ours, streamed, or the videos that another system has made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from data.bench.cases import Case
from data.bench.clip import BenchClip
from data.video import VideoError, probe, read_frames
from infra.runtime.errors import UserError
from pipelines.evaluation.evaluate import edit_clip

if TYPE_CHECKING:
    from modeling.editor import StreamingEditor

ENDINGS = (".mp4", ".mkv", ".webm", ".mov")
STRETCH = 1.05  # of one side against the other, by which a system's own size may change a picture


class System(Protocol):
    """Edits clips, and says by what name."""

    name: str

    def edit(self, clip: BenchClip) -> tuple[np.ndarray, dict[str, float]]:
        """uint8 as the clip's source, and what there is to say besides its quality."""

    def identity(self, case: Case) -> str:
        """What decides the edit of `case` besides the clip and the settings."""


class OurModel:
    """A model directory through the editor that serves it."""

    def __init__(
        self,
        editor: StreamingEditor,
        seed: int,
        work_size: str = "full",
        detail: bool = False,
    ) -> None:
        self.editor, self.seed, self.name = editor, seed, editor.name
        self.options = {"work_size": work_size, "detail": "source" if detail else "off"}

    def edit(self, clip: BenchClip) -> tuple[np.ndarray, dict[str, float]]:
        chunks, seconds = edit_clip(
            self.editor, clip.source, clip.instruction, self.seed, truth=clip.truth, **self.options
        )
        share = float(np.mean([chunk.recomputed for chunk in chunks]))
        edit = np.concatenate([chunk.frames for chunk in chunks])
        return edit, {"recomputed": share, "fps": len(edit) / seconds}

    def identity(self, case: Case) -> str:
        del case
        device = self.editor.device  # which one moves its rate, and a CPU's instructions its bits
        on = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
        )
        return f"{self.editor.identity} {on} {self.options} {self.seed}"


class Videos:
    """A folder of videos named as the clips are; a picture of another size is brought to theirs."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        if not folder.is_dir():
            raise UserError(f"--outputs {folder} is no folder of videos")

    def check(self, cases: list[Case], size: tuple[int, int]) -> None:
        """Raise a UserError that names what is missing and what cannot be judged, before any is;
        `size` is the sources' height and width."""
        missing = [case.name for case in cases if self.find(case.name) is None]
        wrong = [said for case in cases if (said := self._unlike(case, size))]
        parts = []
        if missing:
            parts.append(
                f"lacks {len(missing)} of {len(cases)} clips: {some(missing)}; give every "
                f"one as NAME{ENDINGS[0]}, or judge fewer clips (half=, every=, long=false)"
            )
        if wrong:
            parts.append(
                f"holds {len(wrong)} that cannot be judged: {some(wrong)}; write one frame for "
                "each of the source's, and the whole picture in its shape"
            )
        if parts:
            raise UserError(f"{self.folder} " + ". It ".join(parts))

    def _unlike(self, case: Case, size: tuple[int, int]) -> str | None:
        """Why the video of `case` cannot be compared with it."""
        path, (height, width) = self.find(case.name), size
        if path is None:
            return None
        try:
            info = probe(path)
        except VideoError as error:
            return str(error)
        if info.frames not in (None, case.frames):
            return f"{path.name} has {info.frames} frames, its source {case.frames}"
        stretch = info.width * height / (info.height * width)
        if not 1 / STRETCH <= stretch <= STRETCH:
            return f"{path.name} is {info.width}x{info.height}, its source {width}x{height}"
        return None

    def find(self, name: str) -> Path | None:
        paths = (self.folder / f"{name}{ending}" for ending in ENDINGS)
        return next((path for path in paths if path.is_file()), None)

    def edit(self, clip: BenchClip) -> tuple[np.ndarray, dict[str, float]]:
        path = self.find(clip.case.name)
        if path is None:
            raise UserError(f"{self.folder} lacks {clip.case.name}")
        height, width = clip.source.shape[1:3]
        info = probe(path)
        size = None if (info.height, info.width) == (height, width) else (height, width)
        frames = list(read_frames(path, size=size))
        if len(frames) != len(clip.source):
            raise UserError(
                f"{path} has {len(frames)} frames, its source {len(clip.source)}; write one frame "
                "for each of the source's, at its rate"
            )
        return np.stack(frames), {}

    def identity(self, case: Case) -> str:
        path = self.find(case.name)
        return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def some(names: list[str]) -> str:
    """The first of them, for a message."""
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
