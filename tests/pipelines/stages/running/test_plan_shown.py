"""How a plan is shown: each figure in its column, what nobody knows left out."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.config.merge import ConfigError
from pipelines.config.stages import ComputeConfig
from pipelines.stages.running import plan
from pipelines.stages.running.expect import States
from pipelines.stages.running.gate import GateMissedError, check_gate
from pipelines.stages.running.plan import Planned, known_card, legend, table
from pipelines.stages.running.runner import _summary
from pipelines.tracking.records import StageRecord

FULL = Planned("vae", "runs", "not done yet", 2, 8, 3600.0, True, States(1.234, 0.5), 0.25, 12_345)
GPU = ComputeConfig(deterministic=False)


def test_a_plan_s_figures_stand_in_their_columns() -> None:
    measured = Planned("causal", "goes on at 3", "", 2, 8, 90.0, states=States(2.0))
    shown = table([FULL, measured, Planned("data", "passed over", "why")])
    assert [str(column.header) for column in shown.columns] == [
        "stage", "does", "why", "workers", "batch", "time", "trains", "GiB a worker",
    ]  # fmt: skip
    rows = [list(row) for row in zip(*(column.cells for column in shown.columns), strict=True)]
    assert rows == [
        ["vae", "runs", "not done yet", "2", "8", "~1 h", "0.0123 M", "1.23 + 0.25; host 0.5"],
        ["causal", "goes on at 3", "", "2", "8", "2 min", "", "2"],
        ["data", "passed over", "why", *[""] * 5],
    ]


@pytest.mark.parametrize(
    ("does", "runs"),
    [("runs", True), ("goes on at 3", True), ("finished", False), ("passed over", False)],
)
def test_what_a_plan_would_do(does: str, runs: bool) -> None:
    assert Planned("vae", does).runs is runs


@pytest.mark.parametrize(
    ("line", "compute", "said"),
    [
        (Planned("vae", "runs"), GPU, ""),
        (Planned("vae", "runs", states=States(1.0)), GPU, "GiB a worker"),
        (Planned("vae", "runs", seconds=9.0), GPU, ""),
        (Planned("vae", "runs", seconds=9.0, counted=True), GPU,
         "~ is counted: the steps' model FLOPs at 36% of H100's 989.4 TFLOP/s"),
        (Planned("vae", "runs", seconds=9.0, counted=True), ComputeConfig(),
         "~ is counted: the steps' model FLOPs at 25% of H100's 989.4 TFLOP/s"),
        (Planned("vae", "runs", workers=2, counted=True), GPU, "say --card H100, or another"),
        (Planned("vae", "runs", counted=True), GPU, ""),
    ],
)  # fmt: skip
def test_what_must_be_known_to_read_it(line: Planned, compute: ComputeConfig, said: str) -> None:
    told = legend([Planned("data", "finished"), line], "H100", compute)
    assert len(told) == bool(said)
    assert "".join(told).startswith(said)


def test_a_card_is_named_or_this_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_card("H100") == "H100"
    with pytest.raises(ConfigError, match="--card abacus: the peaks known are of"):
        known_card("abacus")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "mine")
    for there, name in ((True, "mine"), (False, None)):
        monkeypatch.setattr("torch.cuda.is_available", lambda t=there: t)
        assert known_card(None) == name


@pytest.mark.parametrize(
    ("before", "now", "seconds"),
    [({"pairs": 4}, {"pairs": 8}, 20.0), ({"pairs": 8}, {"pairs": 4}, 5.0),
     ({"pairs": "hash"}, {"pairs": "other"}, 10.0), ({}, {"pairs": 4}, 10.0),
     (None, {"pairs": 4}, None)],
)  # fmt: skip
def test_a_stage_that_trains_nothing_takes_as_long_as_it_did_a_pair(
    before: dict[str, Any] | None, now: dict[str, Any], seconds: float | None
) -> None:
    record = before if before is None else StageRecord(
        "data", "", None, "", "", seconds=10.0, inputs=before
    )  # fmt: skip
    assert plan._seconds(record, now) == seconds


def test_a_stage_s_summary_has_the_figures_that_people_look_for() -> None:
    metrics = {"other": 9.0, "gain": 4.56789, "loss": 0.123456, "pairs": 8.0, "version": 3.0}
    assert _summary(metrics) == "pairs 8  loss 0.1235  gain 4.568  version 3"
    assert _summary({}) == ""


def test_a_missed_gate_says_where_its_stage_lies() -> None:
    check_gate("vae", "/out", {"loss": 1.0}, {"max_loss": 1.0})
    with pytest.raises(GateMissedError, match=r"finished and kept in /out, .*more vae\.steps"):
        check_gate("vae", "/out", {"loss": 1.1}, {"max_loss": 1.0})
