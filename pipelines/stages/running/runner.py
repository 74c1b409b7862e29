"""Run one stage after another, but those whose inputs and output are unchanged."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict, Unpack

from pipelines.config.merge import ConfigError
from pipelines.stages.running.choice import Choice, is_intact, key_for, why_again
from pipelines.stages.running.gate import check_gate
from pipelines.stages.running.progress import StageView
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import Records, StageRecord, fingerprint_of

StageWork = Callable[[Run, str], dict[str, float]]  # (its MLflow run, its key) -> metrics
EVERYTHING = Choice(())
_SUMMARY = ("pairs", "loss", "gain", "background_psnr", "version")


class Enough(Exception):  # noqa: N818  # no error: all that was chosen is done
    """Ends a pipeline after the last stage that was chosen."""


class RunOptions(TypedDict, total=False):
    """What a stage may say of itself."""

    same: str | None  # what must stay for interrupted work to go on in its MLflow run: else all
    gate: Mapping[str, float] | None  # what its metrics must reach
    still_there: Callable[[StageRecord], bool]  # of what it leaves besides its output


class StageRunner:
    """The stages of one pipeline run: their records, their MLflow runs and their lines."""

    def __init__(
        self, output: Path, parent: Run, view: StageView, choice: Choice = EVERYTHING
    ) -> None:
        self.records = Records(output)
        self.parent = parent
        self.view = view
        self.choice = choice

    def run(
        self,
        stage: str,
        version: int,
        inputs: Mapping[str, Any],
        output: str | Path,
        work: StageWork,
        **options: Unpack[RunOptions],
    ) -> StageRecord:
        """Do `work`, unless its record says that the same inputs gave the output that is there.

        `inputs` are plain values: all that decides the result besides the code's `version`.

        Raises GateMissedError if the finished stage does not keep `gate`, ConfigError if it comes
        before what was chosen and is not finished, and Enough after the last stage chosen.
        """
        record = self.records.read(stage)
        why = why_again(record, stage, version, inputs)
        still_there = options.get("still_there")
        if record and why is None and still_there and not still_there(record):
            why = "what it left elsewhere is gone"
        if self.choice.comes_before(stage):
            record = self._as_it_lies(stage, record, why)
        elif record is None or why is not None:
            record = self._work(stage, version, inputs, output, work, options.get("same"), str(why))
        else:
            self._reuse(record)
        self._check_gate(record, options.get("gate") or {})
        if self.choice.is_last(stage):
            raise Enough
        return record

    def pass_over(self, stage: str, why: str) -> None:
        """Say that a stage has nothing to do in this pipeline."""
        self.view.finish(stage, why, "passed")
        if self.choice.is_last(stage):
            raise Enough

    def _work(
        self,
        stage: str,
        version: int,
        inputs: Mapping[str, Any],
        output: str | Path,
        work: StageWork,
        same: str | None,
        why: str,
    ) -> StageRecord:
        key = key_for(stage, version, inputs)
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
            inputs=dict(inputs),
        )
        self.records.write(record)
        rest = {name: value for name, value in metrics.items() if name not in run.logged}
        run.log_metrics({**rest, "seconds": seconds})
        run.finish()
        record.run_id = run.run_id  # which may have to be waited for
        self.records.write(record)
        self.view.finish(stage, _summary(metrics))
        return record

    def _as_it_lies(self, stage: str, record: StageRecord | None, why: str | None) -> StageRecord:
        """What `stage` left, where it comes before what was chosen. `--from` takes it whatever the
        settings are by now, `--only` (which a scheduler starts) does not."""
        option, chosen = (
            ("--only", self.choice.only) if self.choice.only else ("--from", self.choice.first)
        )
        if record is None or (why is not None and (self.choice.only or not is_intact(record))):
            raise ConfigError(
                f"{option} {chosen} needs stage {stage}, which has to run first ({why}): run "
                f"`--only {stage}` before, or leave {option} out"
            )
        if why is not None:
            self.view.warn(f"{stage}: taken as it is, although it would run now: {why}")
        self._reuse(record)
        return record

    def _check_gate(self, record: StageRecord, gate: Mapping[str, float]) -> None:
        check_gate(record.stage, record.output, record.metrics, gate)

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
