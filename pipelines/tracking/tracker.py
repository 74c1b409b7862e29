"""What a pipeline run leaves in MLflow: one parent run, one child run a stage.

Own wrapper around `MlflowClient` (no global active run). It asks at once and waits for the answer:
a pipeline writes into an outbox (`pipelines.tracking.outbox`), which uses this beside it.
MLflow is imported when the first tracker is made; it takes seconds.
"""

from __future__ import annotations

import getpass
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from infra.runtime.environment import environment
from infra.runtime.errors import UserError
from infra.runtime.paths import ROOT
from infra.runtime.registry import client_for

CHECK_ENV = {  # one short try instead of MLflow's minutes of retries
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
# MLflow would print an address that opens its pages for language models, and in the midst of ours.
QUIET = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}

UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens
# Without it MLflow 3 opens its pages for language models, where neither runs nor models are.
SIDE = "workflowType=machine_learning"
NOTE = "mlflow.note.content"  # the tag that the pages show as description
REUSED = "Stages reused from earlier runs"
SOURCE = 250  # characters of a command that are told


class TrackingError(UserError):
    """The tracking server or its database cannot be used; the message says what to do."""


def check_store(uri: str, *, writes: bool = True) -> None:
    """What is wrong with `uri` whoever answers: a training needs no more of it than this.

    A database on this disk is made here, with its tables, if this `writes`. Raises TrackingError.
    """
    if uri.startswith("sqlite:") and writes:
        check_reachable(uri)
    else:
        _check_scheme(uri)


def check_artifacts(uri: str, experiment: str) -> None:
    """Raise a TrackingError where the artifacts of `experiment` are to be written to S3 from here
    and the package for it is missing. Nobody waits for a server that does not answer."""
    if not uri.startswith(("http:", "https:")) or find_spec("boto3") is not None:
        return
    from mlflow.exceptions import MlflowException

    try:
        with environment(CHECK_ENV):
            client = client_for(uri)
            # One that is not there yet will be made beside the default one.
            found = client.get_experiment_by_name(experiment) or client.get_experiment("0")
    except (MlflowException, OSError):
        return
    if found.artifact_location.startswith("s3:"):
        raise TrackingError(
            f"tracking.uri={uri} has the artifacts of {experiment} in {found.artifact_location}, "
            "which this process would write itself: pip install 'liveedit[s3-artifacts]' (boto3), "
            "or start the server with --artifacts-destination, which passes them through"
        )


def check_reachable(uri: str) -> None:
    """Prove within seconds that `uri` answers; a TrackingError says what is wrong with it."""
    _check_scheme(uri)
    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = client_for(uri)
        with environment(CHECK_ENV):
            client.search_experiments(max_results=1)
    except Exception as error:  # MLflow lets requests', SQLAlchemy's and its own errors through
        what, remedy = (
            ("cannot be opened", "free space, or work in another folder")
            if uri.startswith("sqlite:")
            else (
                "does not answer",
                "start the server, correct the address, or leave tracking.uri "
                "out to log into runs/mlflow.db",
            )
        )
        raise TrackingError(f"tracking.uri={uri} {what} ({root_cause(error)}); {remedy}") from error


def _check_scheme(uri: str) -> None:
    if not uri.startswith(("sqlite:", "http:", "https:", "postgresql", "mysql", "databricks")):
        raise TrackingError(
            f"tracking.uri={uri} is no tracking store that MLflow takes; give an http:// or "
            "https:// server, or a database such as sqlite:///runs/mlflow.db"
        )


class Tracker:
    """Writes one MLflow run. Made by `start_pipeline` and `start_stage`, or from (uri, run_id)."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._client = client_for(uri)

    @classmethod
    def start_pipeline(
        cls,
        uri: str,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        at: int | None = None,
    ) -> Tracker:
        """A new parent run in `experiment`, which is made if it is not there; `at` is when it
        began, in ms since 1970, null is now."""
        tags = {"liveedit.kind": "pipeline", **code_tags(), **(tags or {})}
        with naming(uri):
            place = experiment_id(uri, experiment)
            run = client_for(uri).create_run(place, at, run_name=name, tags=tags)
        tracker = cls(uri, run.info.run_id)
        tracker.log_params(params)
        return tracker

    def start_stage(
        self,
        stage: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        at: int | None = None,
    ) -> Tracker:
        """A new child run of this one, named as the stage; `at` as for a pipeline."""
        tags = {
            "mlflow.parentRunId": self.run_id,
            "liveedit.kind": "stage",
            "liveedit.stage": stage,
            **code_tags(),
            **(tags or {}),
        }
        with naming(self.uri):
            run = self._client.create_run(self.experiment_id, at, run_name=stage, tags=tags)
        tracker = Tracker(self.uri, run.info.run_id)
        tracker.log_params(params)
        return tracker

    @cached_property
    def experiment_id(self) -> str:
        return str(self._call(self._client.get_run).info.experiment_id)

    def resume(self, tags: Mapping[str, str]) -> None:
        """Go on in a run that was ended."""
        self.set_tags(tags)
        self._call(self._client.update_run, status="RUNNING")

    def log_metrics(
        self, metrics: Mapping[str, float], step: int = 0, at: int | None = None
    ) -> None:
        """All of `metrics` at `step`, in one request; `at` in ms since 1970, null is now."""
        from mlflow.entities import Metric

        at = int(time.time() * 1000) if at is None else at
        entries = [Metric(key, float(value), at, step) for key, value in metrics.items()]
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

    def log_input(self, name: str, source: str, digest: str, context: str) -> None:
        """A dataset that the run reads: where it lies, and the beginning of its hash."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind = "s3" if source.startswith("s3://") else "local"
        dataset = Dataset(name, digest, kind, json.dumps({"uri": source}))
        used = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
        self._call(self._client.log_inputs, [used])

    def link_reused(self, stage: str, run_id: str) -> None:
        """Tag and describe this run with the run that made the output of `stage`."""
        tag = "liveedit.reused."
        tags = {tag + stage: run_id}
        self.set_tags(tags)
        known = {**self._call(self._client.get_run).data.tags, **tags}
        runs = f"#/experiments/{self.experiment_id}/runs"
        links = [
            f"* {name.removeprefix(tag)}: [{of[:8]}]({runs}/{of}?{SIDE})"
            for name, of in known.items()
            if name.startswith(tag)
        ]
        before = known.get(NOTE, "").partition(REUSED)[0].strip()
        self.set_tags({NOTE: "\n\n".join(filter(None, [before, REUSED, "\n".join(links)]))})

    def finish(self, status: str = "FINISHED", at: int | None = None) -> None:
        """End the run as FINISHED, FAILED or KILLED; `at` in ms since 1970, null is now."""
        with environment(QUIET):
            self._call(self._client.set_terminated, status, at)

    def page(self) -> str:
        """Where a person finds the run."""
        place = f"#/experiments/{self.experiment_id}/runs/{self.run_id}?{SIDE}"
        if self.uri.startswith("http"):
            return f"MLflow: {self.uri}/{place}"
        return f"MLflow: {UI}/{place} after `mlflow ui --backend-store-uri {self.uri}`"

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
        raise TrackingError(f"tracking.uri={uri} stopped working ({root_cause(error)})") from error


def code_tags() -> dict[str, str]:
    """Who runs what, under the names of MLflow's columns. The commit is `-dirty` with local
    changes, `unknown` without git. Settings are parameters, and MLflow shows what follows the last
    slash of a command."""
    commit = code_commit()
    command = takewhile(lambda word: "=" not in word, sys.argv[1:])
    return {
        "liveedit.commit": commit,
        "mlflow.source.git.commit": commit,
        "mlflow.source.name": " ".join(["liveedit", *command])[:SOURCE],
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # a container's user need not have a name


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


def root_cause(error: BaseException) -> str:
    """In one line, what the first of a chain of errors says."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()


def find_run(uri: str, experiment_id: str, mark: str) -> str | None:
    """The run of an experiment that has the tag liveedit.run=`mark`."""
    with naming(uri):
        found = client_for(uri).search_runs(
            [experiment_id], f"tags.`liveedit.run` = '{mark}'", max_results=1
        )
    return str(found[0].info.run_id) if found else None


def experiment_id(uri: str, name: str) -> str:
    """The experiment called `name`, which is made if it is not there."""
    client = client_for(uri)
    with naming(uri):
        found = client.get_experiment_by_name(name)
        if found is None:
            location = None  # a server decides where its artifacts lie
            if uri.startswith("sqlite:///"):
                location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
            return str(client.create_experiment(name, artifact_location=location))
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"tracking.experiment={name} was deleted in {uri}; restore it or choose another"
        )
    return str(found.experiment_id)
