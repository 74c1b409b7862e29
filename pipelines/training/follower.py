"""Passes on what the workers report."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipelines.training.run_folder import RunFolder, TrainingReport


class Follower:
    """Called every now and then while a stage trains, and once after it."""

    def __init__(
        self,
        stage: str,
        folder: RunFolder,
        on_progress: Callable[[TrainingReport], None] | None,
        say: Callable[[str], None] | None,
    ) -> None:
        self.stage, self.folder = stage, folder
        self.on_progress = on_progress or self._print
        self.say = say or self._to_stderr
        self._offset = self._heard = 0

    def __call__(self) -> None:
        lines, self._heard = self.folder.said(self._heard)
        for line in lines:
            self.say(f"{self.stage}: {line}")
        reports, self._offset = self.folder.reports(self._offset)
        for report in reports:
            self.on_progress(report)

    def has_begun(self) -> bool:
        """Whether the workers train, and there is a state to save."""
        return bool(self.folder.reports(0)[0])

    def where_it_goes_on(self) -> str:
        """What to tell whoever stopped the stage, once nothing of it runs any more."""
        saved = self.folder.saved_step()
        return f"Stage {self.stage} was stopped; the same command goes on from " + (
            f"its checkpoint at step {saved}" if saved else "its beginning, with no checkpoint yet"
        )

    def _print(self, report: TrainingReport) -> None:
        self._to_stderr(f"{self.stage}: {report.line()}")

    def _to_stderr(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
