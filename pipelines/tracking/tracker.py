"""What a pipeline run leaves in MLflow: one parent run, one child run a stage.

Own wrapper around `MlflowClient` (no global active run, no threads): a run is named by
(uri, run_id), which travels to Ray workers as two strings, so a restarted worker group goes on in
the same run.
MLflow is imported when the first tracker is made; it takes seconds.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.runtime.ray import environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_FOLDER = Path("runs")
ROOT = Path(__file__).parent.parent.parent
_CHECK_ENV = {  # one short try instead of MLflow's minutes of retries
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


class TrackingError(ValueError):
    """The tracking server or its database cannot be used; the message says what to do."""


def resolve_uri(uri: str | None) -> str:
    """The tracking URI in use: the given one, MLFLOW_TRACKING_URI, or runs/mlflow.db here."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{(DEFAULT_FOLDER / 'mlflow.db').absolute()}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def client_for(uri: str) -> MlflowClient:
    """An MLflow client for `uri`, without telemetry and without a log of database migrations."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_reachable(uri: str) -> None:
    """Prove within seconds that `uri` answers; a TrackingError says what is wrong with it."""
    if not uri.startswith(("sqlite:", "http:", "https:", "postgresql", "mysql", "databricks")):
        raise TrackingError(
            f"tracking.uri={uri} is no tracking store that MLflow takes; give an http:// or "
            "https:// server, or a database such as sqlite:///runs/mlflow.db"
        )
    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = client_for(uri)
        with environment(_CHECK_ENV):
            client.search_experiments(max_results=1)
    except Exception as error:  # MLflow lets requests', SQLAlchemy's and its own errors through
        raise TrackingError(
            f"tracking.uri={uri} does not answer ({_root_cause(error)}); start the "
            "server, correct the address, or leave tracking.uri out to log into runs/mlflow.db"
        ) from error


class Tracker:
    """Writes one MLflow run. Made by `start_pipeline` and `start_stage`, or from (uri, run_id)."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._client = client_for(uri)

    @classmethod
    def start_pipeline(
        cls, uri: str, experiment: str, name: str, params: Mapping[str, Any]
    ) -> Tracker:
        """A new parent run in `experiment`, which is made if it is not there."""
        client = client_for(uri)
        tags = {"liveedit.kind": "pipeline", **code_tags()}
        with naming(uri):
            experiment_id = _experiment_id(client, uri, experiment)
            run = client.create_run(experiment_id, run_name=name, tags=tags)
        tracker = cls(uri, run.info.run_id)
        tracker.log_params(params)
        return tracker

    def start_stage(self, stage: str, params: Mapping[str, Any]) -> Tracker:
        """A new child run of this one, named as the stage."""
        tags = {
            "mlflow.parentRunId": self.run_id,
            "liveedit.kind": "stage",
            "liveedit.stage": stage,
            **code_tags(),
        }
        with naming(self.uri):
            run = self._client.create_run(self.experiment_id, run_name=stage, tags=tags)
        tracker = Tracker(self.uri, run.info.run_id)
        tracker.log_params(params)
        return tracker

    @cached_property
    def experiment_id(self) -> str:
        return str(self._call(self._client.get_run).info.experiment_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """All of `metrics` at `step`, in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._call(self._client.log_batch, metrics=entries)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested mappings become dotted names; a run's parameters cannot be changed later."""
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:6000]) for key, value in flatten(params).items()]
        for first in range(0, len(entries), 100):  # MLflow's limit a request
            self._call(self._client.log_batch, params=entries[first : first + 100])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(key, str(value)) for key, value in tags.items()]
        self._call(self._client.log_batch, tags=entries)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a small file (a card, a picture, a table) into the run."""
        self._call(self._client.log_artifact, str(path), folder)

    def latest_metrics(self) -> dict[str, float]:
        return dict(self._call(self._client.get_run).data.metrics)

    def link(self, run_id: str) -> str:
        """Markdown that leads to another run of the same experiment in MLflow's pages."""
        return f"[{run_id[:8]}](#/experiments/{self.experiment_id}/runs/{run_id})"

    def describe(self, text: str) -> None:
        """The run's description, shown on its page as Markdown."""
        self.set_tags({"mlflow.note.content": text})

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._call(self._client.set_terminated, status)

    def stop(self, error: BaseException) -> None:
        """End the run because of `error`, which stays the one to tell."""
        try:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except TrackingError as second:
            error.add_note(str(second))

    def _call(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with naming(self.uri):
            return method(self.run_id, *arguments, **named)


@contextmanager
def naming(uri: str) -> Iterator[None]:
    """Turn what a store fails with, after MLflow's own retries, into a TrackingError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise TrackingError(
            f"tracking.uri={uri} stopped working ({_root_cause(error)}); mend it and run the same "
            "command again: finished stages are kept"
        ) from error


def code_tags() -> dict[str, str]:
    """The commit of the code that runs, `-dirty` with local changes, `unknown` without git."""
    return {"liveedit.commit": code_commit()}


@cache
def code_commit() -> str:
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("-dirty" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # a container image carries the tree without its history


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _root_cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"tracking.experiment={name} was deleted in {uri}; restore it or choose another"
            )
        return str(found.experiment_id)
    location = None  # a server decides where its artifacts lie
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location))
