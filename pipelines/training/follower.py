"""Passes on what the workers report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress

from pipelines.training.run_folder import Progress, RunFolder

CHECKPOINT_SECONDS = 60  # how long Ctrl-C waits for a checkpoint


class Follower:
    """Called every now and then while a stage trains, and once after it."""

    def __init__(
        self, stage: str, folder: RunFolder, on_progress: Callable[[Progress], None] | None
    ) -> None:
        self.stage, self.folder = stage, folder
        self.on_progress = on_progress or self._print
        self._offset = 0

    def __call__(self) -> None:
        reports, self._offset = self.folder.reports(self._offset)
        for report in reports:
            self.on_progress(report)

    def let_checkpoint_finish(self) -> None:
        """Wait, but not for ever, for a checkpoint that is being written."""
        if self.folder.is_saving():
            self._say("a checkpoint is being written; Ctrl-C again leaves it")
        deadline = time.monotonic() + CHECKPOINT_SECONDS
        with suppress(KeyboardInterrupt):
            while self.folder.is_saving() and time.monotonic() < deadline:
                time.sleep(0.1)

    def where_it_goes_on(self) -> str:
        """What to tell whoever stopped the stage, once nothing of it runs any more."""
        saved = self.folder.saved_step()
        return f"Stage {self.stage} was stopped; the same command goes on from " + (
            f"its checkpoint at step {saved}" if saved else "its beginning, with no checkpoint yet"
        )

    def _print(self, report: Progress) -> None:
        self._say(report.line())

    def _say(self, text: str) -> None:
        print(f"{self.stage}: {text}", file=sys.stderr, flush=True)
