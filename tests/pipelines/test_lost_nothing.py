"""Pipelines without a training, into one output: what stays for ever, and what MLflow can stop."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from infra.runtime.registry import find_version
from modeling.fingerprint import model_fingerprint
from pipelines.commands.send import send
from pipelines.config.load import load_config
from pipelines.pipeline import run_pipeline
from pipelines.stages.chain import STAGES
from pipelines.stages.register import PipelineResult
from pipelines.stages.running.progress import StageView
from pipelines.tracking import registry
from tests.pipelines.mlflow_server import free_port, mlflow_server
from tests.pipelines.sizes import HEIGHT, WIDTH

ROOT = Path(__file__).parents[2]
CONFIG = f"""
name: tiny
data: {{heldout_pairs: 1, pairs: 1, frames: 9, workers: 0}}
model:
  transformer: {{dim: 24, ffn_dim: 48, num_heads: 2, num_layers: 1}}
  vae: {{widths: [8, 8, 8, 8]}}
  stream: {{height: {HEIGHT}, width: {WIDTH}, window_latents: 6, mask_cache: null}}
vae: {{steps: 0}}
foundation: {{steps: 0}}
causal: {{steps: 0}}
distill: {{steps: 0}}
evaluate: {{min_gain_db: -100, min_background_db: -100}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def run(folder: Path, uri: str, *overrides: str) -> PipelineResult:
    places = [f"output={folder / 'out'}", f"tracking.uri={uri}"]
    config = load_config(folder / "tiny.yaml", [*places, *overrides])
    with StageView(Console(file=StringIO()), STAGES) as view:
        return run_pipeline(config, view)


def test_a_rerun_into_the_same_output_leaves_every_version_as_it_was(
    folder: Path, mlflow_uri: str
) -> None:
    first = run(folder, mlflow_uri)
    fingerprint = model_fingerprint(first.model)
    assert first.aliases == ["candidate", "production"]
    second = run(folder, mlflow_uri, "seed=1", "evaluate.min_gain_db=1000")
    assert second.aliases == ["candidate"]
    assert (first.version, second.version) == ("1", "2")
    assert model_fingerprint(folder / "out" / "models" / "start") == model_fingerprint(second.model)
    assert registry.resolve("models:/liveedit@production", mlflow_uri) == first.model
    assert model_fingerprint(first.model) == fingerprint != model_fingerprint(second.model)
    again = run(folder, mlflow_uri)
    assert (again.version, again.model) == ("1", first.model)


def test_what_was_rolled_back_stays_so_when_nothing_changed(folder: Path, mlflow_uri: str) -> None:
    run(folder, mlflow_uri)
    run(folder, mlflow_uri, "seed=1")
    registry.rollback("liveedit", "production", mlflow_uri)
    run(folder, mlflow_uri, "seed=1")
    now = find_version("models:/liveedit@production", mlflow_uri)
    assert now.version == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_train_with_a_dead_mlflow_ends_well_and_one_command_sends_all(
    folder: Path, mlflow_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "pipelines", "train", "tiny.yaml"]
    done = subprocess.run(
        [*command, "output=out", f"tracking.uri=http://127.0.0.1:{port}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert said.count("does not answer") == 1
    assert "not in the registry yet" in said
    assert f"`liveedit send {folder / 'out'}` sends it" in said
    with mlflow_server(mlflow_uri, folder, port) as address:
        send(folder / "out", None)
        assert "Waiting" not in capfd.readouterr().err, "a line of MLflow's own"
        model = registry.resolve("models:/liveedit@production", address)
        assert model.parent == folder / "out" / "versions"
        version = registry.versions("liveedit", address)[0]
        assert version.tags["metric.gain"]
