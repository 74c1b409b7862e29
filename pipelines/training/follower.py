"""Passes what the workers report on to the terminal and to MLflow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress

from pipelines.config.pipeline import PipelineConfig
from pipelines.tracking.tracker import Tracker
from pipelines.training.run_folder import Progress, RunFolder

CHECKPOINT_SECONDS = 60  # how long Ctrl-C waits for a checkpoint


class Follower:
    """Called every now and then while a stage trains, and once after it."""

    def __init__(
        self,
        stage: str,
        folder: RunFolder,
        config: PipelineConfig,
        run_id: str | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.stage, self.folder = stage, folder
        self.on_progress = on_progress or self._print
        self.tracker: Tracker | None = None
        if run_id is not None:
            assert config.tracking.uri is not None
            self.tracker = Tracker(config.tracking.uri, run_id)
        self._offset = 0
        self._unlogged: list[Progress] = []
        self._complained = False

    def __call__(self) -> None:
        reports, self._offset = self.folder.reports(self._offset)
        for report in reports:
            self.on_progress(report)
        if self.tracker is not None and reports:
            self._unlogged += reports
            self._log(self.tracker)

    def finish(self) -> None:
        """Pass on the last reports; what MLflow still does not take is lost, and said so."""
        self()
        if self.tracker is not None and self._unlogged:
            self._log(self.tracker)
        if self._unlogged:
            self._say(f"{len(self._unlogged)} reports of its metrics are missing in MLflow")

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

    def _log(self, tracker: Tracker) -> None:
        """A server that does not answer holds no training up: hours of it are worth more than a
        curve. What was not logged is sent with the next reports."""
        from mlflow.exceptions import MlflowException

        try:
            while self._unlogged:
                tracker.log_metrics(self._unlogged[0].metrics, self._unlogged[0].step)
                del self._unlogged[0]
        except MlflowException as error:
            if not self._complained:
                self._say(f"MLflow does not take metrics ({error}); training goes on without")
            self._complained = True

    def _print(self, report: Progress) -> None:
        self._say(report.line())

    def _say(self, text: str) -> None:
        print(f"{self.stage}: {text}", file=sys.stderr, flush=True)
