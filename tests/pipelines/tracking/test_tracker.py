from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.runtime.registry import client_for, resolve_uri
from modeling.fingerprint import model_fingerprint
from pipelines.tracking import registry
from pipelines.tracking import tracker as tracking
from pipelines.tracking.tracker import Tracker, TrackingError
from tests.pipelines.mlflow_server import mlflow_server


@pytest.fixture
def server(mlflow_uri: str, tmp_path: Path) -> Iterator[str]:
    with mlflow_server(mlflow_uri, tmp_path) as address:
        yield address


def test_parent_and_stage_runs(mlflow_uri: str, tmp_path: Path) -> None:
    parent = Tracker.start_pipeline(mlflow_uri, "liveedit", "demo", {"data": {"pairs": 4}})
    child = parent.start_stage("vae", {"steps": 10})
    child.log_metrics({"loss": 2.0, "psnr": 20.0}, step=1)
    Tracker(mlflow_uri, child.run_id).log_metrics({"loss": 1.0}, step=2)  # as a worker does
    file = tmp_path / "card.json"
    file.write_text("{}")
    child.log_artifact(file)
    child.finish()
    parent.finish("KILLED")

    client = client_for(mlflow_uri)
    child.resume({"liveedit.commit": "later"})
    again = client.get_run(child.run_id)
    assert (again.info.status, again.data.tags["liveedit.commit"]) == ("RUNNING", "later")
    child.finish()
    run = client.get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["liveedit.commit"] == "later"
    assert run.data.params == {"steps": "10"}
    assert [(m.step, m.value) for m in client.get_metric_history(child.run_id, "loss")] == [
        (1, 2.0),
        (2, 1.0),
    ]
    assert [artifact.path for artifact in client.list_artifacts(child.run_id)] == ["card.json"]
    top = client.get_run(parent.run_id)
    assert top.info.status == "KILLED"
    assert top.data.params == {"data.pairs": "4"}
    place = f"/#/experiments/{top.info.experiment_id}/runs/{parent.run_id}?"
    assert f"http://127.0.0.1:5000{place}workflowType=machine_learning" in parent.page()
    assert f"mlflow ui --backend-store-uri {mlflow_uri}" in parent.page()


def test_a_run_comes_from_a_command_without_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["x/liveedit", "train", "demo", "--from", "causal", "tracking.uri=http://a:secret@b/c"]
    monkeypatch.setattr("sys.argv", words)
    assert tracking.code_tags()["mlflow.source.name"] == "liveedit train demo --from causal"


def test_any_number_of_parameters(mlflow_uri: str) -> None:
    params = {f"key{n}": n for n in range(250)}
    tracker = Tracker.start_pipeline(mlflow_uri, "liveedit", "many", params)
    assert len(client_for(mlflow_uri).get_run(tracker.run_id).data.params) == 250


def test_default_is_a_database_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri("sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert resolve_uri(None) == "http://mlflow:5000"
    assert resolve_uri("https://other") == "https://other"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("http://127.0.0.1:9", "does not answer .*start the server"),
        ("sqlite:////proc/nothing/mlflow.db", "cannot be opened .*free space, or work in another"),
        ("ftp://x", "is no tracking store"),
    ],
)
def test_unreachable_store_is_one_clear_error(uri: str, told: str) -> None:
    with pytest.raises(TrackingError, match=rf"tracking\.uri={uri} {told}"):
        tracking.check_reachable(uri)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_silent_server_is_an_error_and_no_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert float(tracking.CHECK_ENV["MLFLOW_HTTP_REQUEST_TIMEOUT"]) <= 5
    monkeypatch.setitem(tracking.CHECK_ENV, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    begun = time.monotonic()
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TrackingError, match="does not answer"):
            tracking.check_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - begun < 60  # MLflow waits two minutes, and tries seven times again


def test_code_without_git_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    tracking.code_commit.cache_clear()
    try:
        assert tracking.code_commit() == "unknown"
    finally:
        tracking.code_commit.cache_clear()


def test_what_git_does_not_keep_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit() -> str:
        tracking.code_commit.cache_clear()
        return tracking.code_commit()

    monkeypatch.setattr(tracking, "ROOT", tmp_path)
    try:
        git("init", "-q")
        (tmp_path / "kept").write_text("one")
        git("add", "kept")
        git("commit", "-qm", "first")
        (tmp_path / "a note").touch()
        assert commit() == git("rev-parse", "HEAD")
        (tmp_path / "kept").write_text("two")
        assert commit() == git("rev-parse", "HEAD") + "-dirty"
    finally:
        tracking.code_commit.cache_clear()


def test_a_git_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that is gone."""

    def hang(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    tracking.code_commit.cache_clear()
    try:
        assert tracking.code_commit() == "unknown"
    finally:
        tracking.code_commit.cache_clear()


@pytest.mark.slow  # starts MLflow's server
def test_runs_and_registry_over_http(
    server: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.check_reachable(server)
    parent = Tracker.start_pipeline(server, "liveedit", "demo", {})
    parent.log_metrics({"gain": 5.0})
    parent.log_artifact(tiny_model / "card.json")
    version = registry.register(
        server,
        "liveedit",
        tiny_model,
        run_id=parent.run_id,
        fingerprint=model_fingerprint(tiny_model),
        metrics={"gain": 5.0},
        aliases=("candidate",),
    )
    assert version == "1"
    assert parent.page().startswith(f"MLflow: {server}/#/experiments/")
    assert registry.resolve("models:/liveedit@candidate", server) == tiny_model

    monkeypatch.setattr(tracking, "find_spec", lambda name: None)  # no boto3
    tracking.check_artifacts(server, "not there yet")  # beside the default one: through the server
    client_for(server).create_experiment("direct", "s3://bucket/artifacts")
    with pytest.raises(TrackingError, match=r"s3://bucket/artifacts, .*liveedit\[s3-artifacts\]"):
        tracking.check_artifacts(server, "direct")
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    tracking.check_artifacts(server, "direct")


def test_store_that_breaks_on_the_way_is_named(mlflow_uri: str) -> None:
    tracker = Tracker.start_pipeline(mlflow_uri, "liveedit", "demo", {})
    Path(mlflow_uri.removeprefix("sqlite:///")).write_bytes(b"no database" * 1000)
    with pytest.raises(TrackingError, match=r"tracking.uri=sqlite.* stopped working"):
        tracker.log_metrics({"loss": 1.0}, step=1)
