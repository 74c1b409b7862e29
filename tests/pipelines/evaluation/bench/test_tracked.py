"""What MLflow is told of reports of the benchmark, and of ablations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluation import ablation
from pipelines.evaluation.bench import tracked
from pipelines.evaluation.bench.tracked import figures
from pipelines.tracking.tracker import TrackingError
from tests.pipelines.evaluation.bench.test_pictures import entry


def test_what_is_tracked_are_the_means_by_half_and_kind() -> None:
    report = {
        "overall": {"all": {"gain": entry(3.0, 1, 9)}, "drawn": {"fps": entry(5.0, 1, 9)}},
        "kinds": {"drawn, tone": {"gain": entry(2.0, 1, 9), "drift": entry(0.5, 0, 1)}},
        "traits": {"fast": {"gain": entry(8.0, 0, 1)}},
    }
    found = {"all/gain": 3.0, "drawn/fps": 5.0, "drawn/tone/gain": 2.0, "drawn/tone/drift": 0.5}
    assert figures(report) == found


class Runs:
    """What is told to MLflow's runs, each by its name."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start_pipeline(
        self, uri: str, experiment: str, name: str, about: dict[str, Any], tags: Any
    ) -> Run:
        self.told.append((uri, experiment, name, about))
        return Run(self.told, "parent")


class Run:
    def __init__(self, told: list[Any], name: str) -> None:
        self.told, self.name = told, name

    def start_stage(self, name: str, parameters: dict[str, str]) -> Run:
        self.told.append((name, parameters))
        return Run(self.told, name)

    def __getattr__(self, asked: str) -> Callable[..., str]:
        return lambda *given: self.told.append((self.name, asked, *given)) or "page"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    for module in (ablation, tracked):
        monkeypatch.setattr(module, "resolve_uri", lambda uri: "here")
        monkeypatch.setattr(module, "check_reachable", lambda uri: None)
        monkeypatch.setattr(module, "Tracker", made)
    return made


def test_a_report_is_tracked_with_its_settings_its_figures_and_its_files(runs: Runs) -> None:
    report = {
        "version": "9", "system": "mine", "footage": "hash", "made": "2 clips", "kinds": {},
        "settings": {"seed": 3}, "overall": {"drawn": {"gain": entry(5.0, 0, 9)}}, "clips": [],
    }  # fmt: skip
    assert tracked.log_report(report, [Path("x.md"), Path("y.png")]) == "page"
    about = {"version": "9", "system": "mine", "footage": "hash", "made": "2 clips", "seed": 3}
    assert runs.told == [
        ("here", "liveedit-bench", "mine", about),
        ("parent", "log_metrics", {"drawn/gain": 5.0}),
        ("parent", "log_artifact", Path("x.md")), ("parent", "log_artifact", Path("y.png")),
        ("parent", "finish"), ("parent", "page"),
    ]  # fmt: skip


def test_an_ablation_is_tracked_as_a_run_with_a_child_for_each_variant(runs: Runs) -> None:
    reports = [
        {"variant": name, "made": "2 pairs", "settings": {"seed": 3}, "kinds": {},
         "overall": {"pairs": {"gain": entry(gain, 0, 9)}}, "against": {"loss": entry(loss, 0, 9)}}
        for name, gain, loss in (("a", 5.0, 0.0), ("b", 4.0, 1.0))
    ]  # fmt: skip
    assert ablation.log_reports("liveedit ablate", reports, [Path("x.md")]) == "page"
    about = {"command": "liveedit ablate", "made": "2 pairs", "seed": 3}
    assert runs.told == [
        ("here", "liveedit-bench", "ablation", about),
        ("a", {"variant": "a"}), ("a", "log_metrics", {"pairs/gain": 5.0, "loss": 0.0}),
        ("a", "finish"),
        ("b", {"variant": "b"}), ("b", "log_metrics", {"pairs/gain": 4.0, "loss": 1.0}),
        ("b", "finish"),
        ("parent", "log_artifact", Path("x.md")), ("parent", "finish"), ("parent", "page"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "log"),
    [
        (ablation, lambda report: ablation.log_reports("liveedit ablate", [report], [])),
        (tracked, lambda report: tracked.log_report(report, [])),
    ],
)
def test_nothing_is_begun_where_nobody_tracks(
    module: Any, log: Callable[[Any], str], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(uri: str) -> None:
        assert uri == "here"
        raise TrackingError("nobody answers")

    monkeypatch.setattr(module, "check_reachable", silent)
    report = {"made": "", "settings": {}, "version": "", "system": "", "footage": ""}
    with pytest.raises(TrackingError, match="nobody answers"):
        log(report)
    assert runs.told == []
