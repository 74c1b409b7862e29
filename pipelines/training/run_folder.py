"""The folder of one training: Ray's checkpoints, and files that pass between driver and workers.

It must be visible to all nodes, as the model directories beside it are.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from infra.runtime.errors import UserError


class TrainingError(UserError):
    """A training that would fail again in the same way; the message says what to change."""


@dataclass(frozen=True)
class TrainingReport:
    """What the first worker reports every `log_every` steps."""

    step: int  # steps done
    steps: int
    metrics: dict[str, float]  # means over the steps since the last report and over all workers
    seconds_per_step: float  # 0 in the report of a validation
    pid: int = 0  # of the first worker
    resumed: bool = False  # the first report after a start from a checkpoint
    system: dict[str, float] = field(default_factory=dict)  # of its machine, see system_metrics
    files: dict[str, str] = field(default_factory=dict)  # for the run, and where there

    @property
    def seconds_left(self) -> float:
        return (self.steps - self.step) * self.seconds_per_step

    def line(self) -> str:
        """For a terminal."""
        shown = [f"{k} {self.metrics[k]:.4g}" for k in _SHOWN if k in self.metrics]
        left = int(self.seconds_left + 0.5)
        if self.seconds_per_step:
            shown += [f"{self.seconds_per_step:.3g} s/step", f"{left // 60}:{left % 60:02d} left"]
        return "  ".join([f"step {self.step}/{self.steps}", *shown])


_SHOWN = (
    "validation_loss",
    "validation_gain",
    "loss",
    "psnr",
    "dmd_loss",
    "regression_loss",
    "critic_loss",
)


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._progress = path / "progress.jsonl"
        self._refusal = path / "refused.txt"
        self._said = path / "said.txt"
        self._hang = path / "hung.txt"
        self._stop = path / "stop"

    def open(self) -> None:
        """Make the folder; what an earlier try refused is forgotten, its checkpoints are kept."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._progress.write_text("")
        self._said.write_text("")
        self._refusal.unlink(missing_ok=True)
        self._hang.unlink(missing_ok=True)
        self._stop.unlink(missing_ok=True)
        for part in self.path.glob(".part-*"):  # of workers that were killed while they saved
            shutil.rmtree(part, ignore_errors=True)

    def report(self, progress: TrainingReport) -> None:
        with self._progress.open("a") as file:
            file.write(json.dumps(vars(progress)) + "\n")

    def reports(self, offset: int) -> tuple[list[TrainingReport], int]:
        """Whole lines after byte `offset`, and the offset to go on from."""
        with self._progress.open("rb") as file:
            file.seek(offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        return [
            TrainingReport(**json.loads(line)) for line in data[:end].splitlines()
        ], offset + end

    def say(self, text: str) -> None:
        """Tell whoever watches the driver."""
        with self._said.open("a") as file:
            file.write(text + "\n")

    def said(self, offset: int) -> tuple[list[str], int]:
        """Whole lines after byte `offset`, and the offset to go on from."""
        data = self._said.read_bytes()[offset:]
        end = data.rfind(b"\n") + 1
        return data[:end].decode().splitlines(), offset + end

    def tell_hang(self, text: str) -> None:
        """Say which worker hangs, and keep it for whoever asks why the training ended."""
        self.say(text)
        self._hang.write_text(text)

    def hang(self) -> str | None:
        return self._hang.read_text() if self._hang.is_file() else None

    def ask_to_stop(self) -> None:
        """Make the workers save their state and end."""
        self._stop.touch()

    def is_to_stop(self) -> bool:
        return self._stop.exists()

    def refuse(self, message: str) -> None:
        """Leave word for the restarted workers that going on is of no use."""
        with contextlib.suppress(OSError):  # a full disk; Ray then tries again before it gives up
            self._refusal.write_text(message)

    def refusal(self) -> str | None:
        return self._refusal.read_text() if self._refusal.is_file() else None

    def new_part(self, rank: int) -> Path:
        """A new folder where a worker writes its part of a checkpoint until it is whole: on the
        disk that must hold it anyway."""
        self.clear_part(rank)
        folder = self._part(rank)
        folder.mkdir()
        return folder

    def clear_part(self, rank: int) -> None:
        """Remove what a worker that was killed left of its part."""
        shutil.rmtree(self._part(rank), ignore_errors=True)

    def _part(self, rank: int) -> Path:
        return self.path / f".part-{rank}"

    def checkpoints(self) -> list[Path]:
        """Those in this folder, whole or not, newest first; Ray's own list of them is a file."""
        found = [path for path in self.path.glob("checkpoint_*") if path.is_dir()]
        return sorted(found, reverse=True)

    def others(self) -> list[Path]:
        """Folders of other trainings of this stage that have checkpoints."""
        stage = self.path.name.rpartition("-")[0]
        return [
            folder
            for folder in sorted(self.path.parent.glob(f"{stage}-*"))
            if folder != self.path and RunFolder(folder).checkpoints()
        ]

    def saved_step(self) -> int:
        """After how many steps the newest checkpoint was taken; 0 for none."""
        for saved in self.checkpoints():
            with contextlib.suppress(OSError, ValueError):
                return int(json.loads((saved / "manifest-0.json").read_text())["step"])
        return 0

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
