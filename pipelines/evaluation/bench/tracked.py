"""A report of the benchmark in MLflow: one run, its figures, and the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.runtime.registry import resolve_uri
from pipelines.tracking.tracker import NOTE, Tracker, check_reachable

EXPERIMENT = "liveedit-bench"
BENCH = "One system on the clips of LiveEdit-Bench; the report is among the artifacts."


def log_report(report: dict[str, Any], files: list[Path]) -> str:
    """Log to MLFLOW_TRACKING_URI, or runs/mlflow.db here; says where. Raises TrackingError."""
    uri = resolve_uri(None)
    check_reachable(uri)
    about = {name: report[name] for name in ("version", "system", "footage", "made")}
    run = Tracker.start_pipeline(
        uri,
        EXPERIMENT,
        report["system"],
        {**about, **report["settings"]},
        {"liveedit.kind": "benchmark", NOTE: BENCH},
    )
    run.log_metrics(figures(report))
    for file in files:
        run.log_artifact(file)
    run.finish()
    return run.page()


def figures(report: dict[str, Any]) -> dict[str, float]:
    """`all/gain`, `natural/gain`, `natural/recolor/gain` and so on: the means."""
    found: dict[str, float] = {}
    for name, values in (*report["overall"].items(), *report["kinds"].items()):
        place = name.replace(", ", "/")
        found |= {f"{place}/{metric}": value["mean"] for metric, value in values.items()}
    return found
