"""Entries of an outbox, as requests to MLflow. Each may be sent again: it then changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.tracking import lineage, registry
from pipelines.tracking.tracker import Tracker, experiment_id, find_run


class MissingRunError(LookupError):
    """A run that MLflow should have and has not: somebody deleted it, or it is another MLflow."""


class Sender:
    def __init__(self, uri: str, experiment: str) -> None:
        self.uri, self.experiment = uri, experiment
        self.runs: dict[str, str] = {}  # our name of a run -> MLflow's

    def send(self, entry: Mapping[str, Any], files: Path) -> str | None:
        """Send one entry of `Outbox.add`; the version's number if it registers one."""
        if entry["what"] == "start":
            self._start(entry)
            return None
        run = self._run(entry["run"])
        if entry["what"] == "resume":
            parent = self._run(entry["parent"]).run_id
            run.resume({**entry["tags"], "mlflow.parentRunId": parent})
        elif entry["what"] == "metrics":
            run.log_metrics(entry["values"], entry["step"], entry["at"])
        elif entry["what"] == "artifact":
            run.log_artifact(files / entry["file"], entry.get("folder") or None)
        elif entry["what"] == "input":
            run.log_input(entry["name"], entry["source"], entry["digest"], entry["context"])
        elif entry["what"] == "used":
            lineage.log_used(self.uri, run.run_id, entry["models"])
        elif entry["what"] == "made":
            made = Path(entry["place"]), entry["fingerprint"], entry["step"]
            lineage.log_made(self.uri, run.run_id, entry["name"], *made)
        elif entry["what"] == "reused":
            of = find_run(self.uri, self.experiment_id, entry["of"]) or entry["of"]
            run.link_reused(entry["stage"], of)
        elif entry["what"] == "end":
            run.finish(entry["status"], entry["at"])
        else:
            return self._register(entry, run, files)
        return None

    def _start(self, entry: Mapping[str, Any]) -> None:
        mark, began = entry["run"], entry["at"]
        tags = {**entry["tags"], "liveedit.run": mark}
        found = find_run(self.uri, self.experiment_id, mark)
        if found is not None:  # it was made, and the answer got lost
            run = Tracker(self.uri, found)
        elif "parent" in entry:
            run = self._run(entry["parent"]).start_stage(entry["name"], {}, tags, began)
        else:
            name = entry["name"]
            run = Tracker.start_pipeline(self.uri, self.experiment, name, {}, tags, began)
        run.log_params(entry["params"])
        self.runs[mark] = run.run_id

    def _register(self, entry: Mapping[str, Any], run: Tracker, files: Path) -> str:
        return registry.register(
            self.uri,
            entry["name"],
            Path(entry["location"]),
            run_id=run.run_id,
            fingerprint=entry["fingerprint"],
            metrics=entry["metrics"],
            aliases=tuple(entry["aliases"]),
            judged_on=tuple(entry["judged_on"]) if entry.get("judged_on") else None,
            shown=[files / name for name in files_of(entry)],
        )

    @cached_property
    def experiment_id(self) -> str:
        return experiment_id(self.uri, self.experiment)

    def _run(self, mark: str) -> Tracker:
        if mark not in self.runs:
            found = find_run(self.uri, self.experiment_id, mark)
            if found is None:
                raise MissingRunError(f"there is no run with the tag liveedit.run={mark}")
            self.runs[mark] = found
        return Tracker(self.uri, self.runs[mark])


def files_of(entry: Mapping[str, Any]) -> list[str]:
    """The small files that wait with an entry."""
    return [entry["file"]] if "file" in entry else list(entry.get("files", ()))


def will_never_take(error: BaseException) -> bool:
    """Whether the same entry would fail in the same way as long as nobody does anything."""
    from mlflow.exceptions import MlflowException

    from modeling.model_dir import ModelError

    ours = (ImportError, MissingRunError, FileNotFoundError, ModelError)
    refusals = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ours):
            return True
        if isinstance(cause, MlflowException) and cause.error_code in refusals:
            return True
        cause = cause.__cause__
    return False
