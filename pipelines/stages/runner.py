"""Run one stage after another, but those whose inputs and output are unchanged."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.config.merge import ConfigError
from pipelines.stages.progress import StageView
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import Records, StageRecord, fingerprint_of, key_of

Work = Callable[[Run, str], dict[str, float]]  # (its MLflow run, its key) -> metrics
_SUMMARY = ("pairs", "loss", "gain", "background_psnr", "version")


class StageRunner:
    """The stages of one pipeline run: their records, their MLflow runs and their lines."""

    def __init__(self, output: Path, parent: Run, view: StageView) -> None:
        self.records = Records(output)
        self.parent = parent
        self.view = view

    def run(
        self,
        stage: str,
        version: int,
        inputs: Mapping[str, Any],
        output: str | Path,
        work: Work,
        *,
        same: str | None = None,
        still_there: Callable[[StageRecord], bool] = lambda record: True,
    ) -> StageRecord:
        """Do `work`, unless its record says that the same inputs gave the output that is there.

        `inputs` are plain values: all that decides the result besides the code's `version`.
        `same` is what must stay for work that was interrupted to go on in its own MLflow run, by
        default all inputs. `still_there` looks at what a stage leaves besides its output.
        """
        key = key_of({"stage": stage, "version": version, **inputs})
        record = self.records.read(stage)
        if (
            record
            and record.key == key
            and record.fingerprint == fingerprint_of(record.output)
            and still_there(record)
        ):
            self._reuse(record)
            return record
        self.view.start(stage)
        run = self.parent.start_stage(stage, inputs, same or key)
        started = time.monotonic()
        try:
            metrics = work(run, key)
        except BaseException as error:
            run.stop(error)
            raise
        seconds = time.monotonic() - started
        record = StageRecord(
            stage=stage,
            key=key,
            fingerprint=fingerprint_of(output),
            output=str(output),
            run_id=run.mark,
            metrics=metrics,
            seconds=seconds,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.records.write(record)
        rest = {name: value for name, value in metrics.items() if name not in run.logged}
        run.log_metrics({**rest, "seconds": seconds})
        run.finish()
        record.run_id = run.run_id  # which may have to be waited for
        self.records.write(record)
        self.view.finish(stage, _summary(metrics))
        return record

    def pass_over(self, stage: str, why: str) -> None:
        """Say that a stage has nothing to do in this pipeline."""
        self.view.finish(stage, why, "passed")

    def _reuse(self, record: StageRecord) -> None:
        """Show the stage as reused; the parent run links to the run that made its output."""
        self.parent.reused(record.stage, record.run_id)
        self.view.finish(record.stage, _summary(record.metrics), "reused")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep a second pipeline out of `output`; ConfigError also where nothing can be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"output={output} cannot be written to ({error}); give another output=FOLDER"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"output={output} is in use by another pipeline; wait for it, or give another "
                "output=FOLDER"
            ) from error
        yield


def _summary(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in _SUMMARY if name in metrics)
