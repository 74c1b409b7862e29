"""The training benchmark on two processes, with the smallest clips of the demo.

No test depends on how long anything takes.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from infra.runtime.errors import UserError
from modeling.model_dir import load_model
from pipelines.bench.drawn import draw_model
from pipelines.bench.kills import Killer
from pipelines.bench.train import ratios, summary, together
from pipelines.bench.training_worker import TrainCase
from pipelines.commands.measure.stream import bench_app
from pipelines.config.load import load_config
from pipelines.training.run_folder import TrainingReport

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


def test_ratios_are_of_one_run() -> None:
    cases = [
        {"name": TrainCase(*case).name, "stage": case[0], "workers": case[1], "zero": case[2],
         "out_of_memory": False, "seconds": seconds, "tflops": 100.0 / seconds}
        for case, seconds in (
            (("causal", 1, 2), 2.0), (("causal", 4, 2), 2.5), (("causal", 4, 3), 4.0),
        )
    ]  # fmt: skip
    found = ratios({"yardstick": {"tflops": 800.0}, "cases": cases})
    assert {name: entry["value"] for name, entry in found.items()} == {
        "causal, 1 workers, ZeRO-2 / matrix products": 16.0,
        "causal, 4 workers, ZeRO-2 / matrix products": 20.0,
        "causal, 4 workers, ZeRO-2 / 1 workers": 1.25,
        "causal, 4 workers, ZeRO-3 / matrix products": 32.0,
    }


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


def test_a_case_without_room_has_no_figures_and_no_ratios() -> None:
    case = {"stage": "distill", "workers": 2, "zero": 2}
    row = summary(case | {"out_of_memory": True})
    assert row == case | {"out_of_memory": True, "name": "distill, 2 workers, ZeRO-2"}
    assert ratios({"yardstick": {"tflops": 1.0}, "cases": [row]}) == {}


def test_what_shares_processes() -> None:
    """ZeRO-3 keeps its memory, so nothing may come after it in the same process."""
    cases = [TrainCase("causal", workers, zero) for workers in (1, 2) for zero in (1, 2, 3, 2)]
    groups = []
    while cases:
        groups.append(together(cases))
        cases = cases[len(groups[-1]) :]
    assert [[(c.workers, c.zero) for c in group] for group in groups] == [
        [(1, 1), (1, 2)], [(1, 3)], [(1, 2)], [(2, 1), (2, 2)], [(2, 3)], [(2, 2)],
    ]  # fmt: skip


def test_drawn_weights_are_not_zero(tmp_path: Path) -> None:
    config = load_config("demo", SMALL[1:]).model.resolve()
    draw_model(tmp_path / "model", config, torch.device("cpu"))
    network = load_model(tmp_path / "model").transformer
    assert network is not None
    biases = [name for name, p in network.named_parameters() if not p.any()]
    assert all(name.endswith(".bias") for name in biases)


def test_kills_fall_on_any_worker_at_drawn_steps_and_tell_what_they_cost() -> None:
    clock, killed = [100.0], []
    killer = Killer(
        [2, 5, 6],
        random.Random(4),
        ("kill", "term"),
        kill=lambda pid, number: killed.append((pid, number)),
        workers=lambda pid: [pid, pid + 1],
        clock=lambda: clock[0],
    )

    def report(step: int, pid: int) -> None:
        clock[0] += 1
        killer(TrainingReport(step, 9, {}, 0.1, pid=pid))

    for step in (1, 2, 3):
        report(step, 40)  # the third was on its way when the worker died
    clock[0] += 10
    for step in (1, 2, 3, 4, 7):  # the one that is read comes too late for both
        report(step, 50)
    for step in (4, 5, 6, 7, 8, 9):
        report(step, 60)
    assert [(kill.step, kill.from_step, kill.lost) for kill in killer.kills] == [
        (2, 0, 13.0),
        (7, 3, 4.0),
    ]
    assert [pid // 10 for pid, _ in killed] == [4, 5]
    assert [pid % 10 for pid, _ in killed] == [kill.worker for kill in killer.kills]
    assert [number for _, number in killed] == [signal.SIGKILL, signal.SIGTERM]
    assert [kill.signal for kill in killer.kills] == ["kill", "term"]
    assert {kill.worker for kill in killer.kills} == {0, 1}  # as seed 4 draws


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
