"""Entries as they arrive in a real MLflow: with the times at which they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.runtime.registry import client_for
from pipelines.tracking.sender import Sender


def entry(what: str, run: str, at: int, **values: Any) -> dict[str, Any]:
    return {"what": what, "run": run, "at": at, **values}


def test_what_is_told_late_has_happened_when_it_was_written(
    mlflow_uri: str, tmp_path: Path
) -> None:
    sender = Sender(mlflow_uri, "liveedit")
    start: dict[str, Any] = {"params": {}, "tags": {}}
    for told in (
        entry("start", "p", 1_000, name="demo", **start),
        entry("start", "c", 2_000, name="vae", parent="p", **start),
        entry("metrics", "c", 3_000, values={"loss": 0.5}, step=7),
        entry("end", "c", 4_000, status="FINISHED"),
        entry("end", "p", 5_000, status="FAILED"),
    ):
        assert sender.send(told, tmp_path) is None
        assert told["run"] in sender.runs, "who waits for MLflow's name of the run"
    client = client_for(mlflow_uri)
    parent, child = (client.get_run(sender.runs[mark]).info for mark in ("p", "c"))
    assert (parent.start_time, parent.end_time, parent.status) == (1_000, 5_000, "FAILED")
    assert (child.start_time, child.end_time, child.status) == (2_000, 4_000, "FINISHED")
    (loss,) = client.get_metric_history(child.run_id, "loss")
    assert (loss.timestamp, loss.step, loss.value) == (3_000, 7, 0.5)
