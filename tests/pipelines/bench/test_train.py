"""The training benchmark on two processes, with the smallest clips of the demo.

No test depends on how long anything takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from infra.runtime.errors import UserError
from pipelines.commands.measure.stream import bench_app

pytestmark = pytest.mark.slow
SMALL = ["demo", "model.preset=demo", "data.footage=null", "data.frames=21",
         "model.stream.height=32", "model.stream.width=48", "vae.crop=32"]  # fmt: skip
RUN = ["train", *SMALL, "compute.precision=fp32", "--steps", "2"]
LEARNS = ["compute.activation_checkpointing=true", "distill.generator_every=1",
          "distill.learning_rate=1e-3"]  # fmt: skip
CASES = [("distill", 2), ("distill", 3)]  # whose critic trains as the other stages do


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "train.json"
    asked = ["--stages", "distill", "--gpus", "2", "--zero", "2,3", "--json", str(file)]
    result = CliRunner().invoke(bench_app, [*RUN, *asked, *LEARNS])
    assert result.exit_code == 0, result.output
    for words in ("distill, 2", "21 frames at 48x32"):
        assert words in result.output
    return dict(json.loads(file.read_text()))


def test_every_case_has_its_figures(report: dict[str, Any]) -> None:
    assert [(case["stage"], case["zero"]) for case in report["cases"]] == CASES
    for case in report["cases"]:
        assert case["workers"] == 2
        assert not case["out_of_memory"]
        assert len(case["seconds_of_steps"]) == 2  # the warm-up is not among them
        assert case["seconds"] == pytest.approx(sum(case["seconds_of_steps"]) / 2)
        assert case["tflops"] == pytest.approx(case["model_tflop"] / case["seconds"])
        assert case["mfu"] is None  # nobody knows a CPU's peak
        assert 0 < case["data_wait_s"] < case["seconds"]
        assert case["loss"] > 0
    assert report["hardware"]["device"] == "cpu"
    assert report["yardstick"]["tflops"] > 0


def test_sharded_weights_train_to_the_same_losses(report: dict[str, Any]) -> None:
    """With ZeRO-3 blocks are gathered whole, and rollouts go through a copy that must not lag."""
    two, three = report["cases"]
    assert three["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert three["model_tflop"] == pytest.approx(two["model_tflop"])


def test_check_fails_the_command(report: dict[str, Any], tmp_path: Path) -> None:
    stored = {**report, "config": {**report["config"], "cases": ["foundation, 1 workers, ZeRO-2"]}}
    stored["config"] |= {"steps": 1, "batch_size": {"foundation": 1}}
    name = "foundation, 1 workers, ZeRO-2 / matrix products"
    stored["config"]["compute"] = report["config"]["compute"] | {"activation_checkpointing": False}
    stored["ratios"] = {name: {"value": 1e-3, "tolerance": 0.1}}
    (tmp_path / "stored.json").write_text(json.dumps(stored))
    once = ["--stages", "foundation", "--steps", "1", "--check", str(tmp_path / "stored.json")]
    result = CliRunner().invoke(bench_app, [*RUN, *once, "foundation.batch_size=1"])
    assert result.exit_code == 1, result.output
    assert result.output.strip().endswith(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "9", "--steps", "5"], "--kills 9 do not fit into 5 steps"),
        (["--kills", "1", "--signals", "kill,stop"], "--signals stop is unknown"),
        (["--stages", "foundation,vae"], "--stages vae cannot be timed"),
        (["--gpus", "0"], "--gpus 0 must be numbers from 1 on"),
        (["--gpus", "two"], "--gpus two must be numbers"),
        (["--zero", "4"], "zero_stage=4 does not exist"),
        (["--steps", "0"], "times nothing"),
        (["--json", "absent/x.json"], "folder absent"),
        (["--check", "STORED"], "cases"),
        (["foundation.stops=3"], "stops"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: list[str], message: str, report: dict[str, Any], tmp_path: Path
) -> None:
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(report))
    given = [str(stored) if a == "STORED" else a for a in arguments]
    result = CliRunner().invoke(bench_app, [*RUN, *given])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
