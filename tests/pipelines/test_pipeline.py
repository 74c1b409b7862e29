"""The whole job at its smallest, with the real Ray, DeepSpeed and MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from data.video import probe
from infra.runtime.registry import client_for
from modeling.editor import StreamingEditor
from modeling.model_dir import read_card
from pipelines.commands.run import run_train
from pipelines.config.load import load_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.pipeline import run_pipeline
from pipelines.stages.chain import STAGES
from pipelines.stages.register import PipelineResult
from pipelines.stages.running.progress import StageView
from pipelines.tracking.registry import resolve
from pipelines.training.run_folder import RunFolder

ROOT = Path(__file__).parent.parent.parent
# Five starts of training workers, on a busy machine too.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CONFIG = """
name: tiny
data: {pairs: 4, heldout_pairs: 2, frames: 21, samples_per_shard: 2, workers: 0}
model:
  transformer: {dim: 24, ffn_dim: 48, num_heads: 2, num_layers: 2}
  vae: {widths: [16, 12, 8, 8]}
  stream: {height: 32, width: 48, window_latents: 6}
compute: {workers: 1, gpus: false}
vae: {steps: 4, log_every: 1, batch_size: 1, clip_frames: 5}
foundation: {steps: 2, log_every: 1, validate_every: 2, sample_clips: 1}
causal: {steps: 2, log_every: 1}
distill: {steps: 2, log_every: 1, generator_every: 2}
evaluate: {clips: 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def database(_migrated: Path, folder: Path) -> str:
    shutil.copy(_migrated, folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def configured(folder: Path, database: str, *overrides: str) -> PipelineConfig:
    places = [f"output={folder / 'out'}", f"tracking.uri={database}"]
    return load_config(folder / "tiny.yaml", [*places, *overrides])


def go(config: PipelineConfig) -> tuple[PipelineResult, StageView]:
    view = StageView(Console(file=StringIO()), STAGES)
    with view:
        return run_pipeline(config, view), view


@pytest.fixture(scope="module")
def interrupted(folder: Path, database: str) -> str:
    """What `liveedit train` says when Ctrl-C comes while the first stage trains."""
    command = [sys.executable, "-m", "pipelines", "train", "tiny.yaml"]
    process = subprocess.Popen(
        [
            *(*command, f"output={folder / 'out'}", f"tracking.uri={database}"),
            *("vae.steps=100000", "vae.seed=1"),
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "vae" in line and "started" in line:
                progress = wait_for_progress(folder / "out" / "checkpoints", process)
                assert progress, said
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        assert process.wait() == 130, said
        return said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_progress(checkpoints: Path, process: subprocess.Popen[str]) -> bool:
    while process.poll() is None:
        if any(file.stat().st_size for file in checkpoints.glob("vae-*/progress.jsonl")):
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def first(interrupted: str, folder: Path, database: str) -> tuple[PipelineResult, StageView]:
    return go(configured(folder, database))


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(
    interrupted: str, folder: Path
) -> None:
    assert "Finished and kept: data, heldout, start. Run the same command again" in interrupted
    assert "Traceback" not in interrupted
    records = {path.stem for path in (folder / "out" / "stages").glob("*.json")}
    assert {"data", "heldout", "start"} <= records


def test_every_stage_runs_and_leaves_a_model_that_edits(
    first: tuple[PipelineResult, StageView], folder: Path, database: str
) -> None:
    result, view = first
    assert view.finished == list(STAGES)
    assert view.reused == ["data", "heldout", "start"]  # from before Ctrl-C
    editor = StreamingEditor.load(result.model)
    assert (editor.config.stream.height, editor.config.stream.width) == (32, 48)
    assert resolve("models:/liveedit@candidate", database) == result.model
    report = json.loads(result.report.read_text())
    assert len(report["clips"]) == 2
    assert report["mean"] == result.metrics
    assert "| gain |" in result.table.read_text()
    assert result.picture.is_file()
    (of_another_seed,) = (folder / "out" / "checkpoints").iterdir()
    assert RunFolder(of_another_seed).saved_step() > 0  # that was interrupted, and stays


def test_lineage_leads_from_the_model_to_the_data(
    first: tuple[PipelineResult, StageView], database: str
) -> None:
    result, _ = first
    client = client_for(database)
    version = client.get_model_version("liveedit", result.version)
    parent = client.get_run(version.run_id)
    assert parent.info.run_id == result.run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.params["distill.steps"] == "2"
    assert parent.data.tags["liveedit.commit"]
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run_id}'"
    )
    # A search leaves out which models a run used.
    children = {run.info.run_name: client.get_run(run.info.run_id) for run in found}
    assert set(children) == set(STAGES) - {"data", "heldout", "start"}
    for stage in ("vae", "foundation", "causal", "distill"):
        run = children[stage]
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [entry.step for entry in history] == list(range(1, 5 if stage == "vae" else 3))
        held = stage == "foundation"
        given = {tag.value for entry in run.inputs.dataset_inputs for tag in entry.tags}
        assert given == ({"training", "validation"} if held else {"training"})
        assert len(run.inputs.model_inputs) == (2 if stage == "distill" else 1)
        assert len(run.outputs.model_outputs) == 1
        top = [a.path for a in client.list_artifacts(run.info.run_id)]
        assert top == ["card.json"] + ["validation"] * held
        if held:
            shown = client.list_artifacts(run.info.run_id, "validation/step-000002")
            assert [Path(a.path).name for a in shown] == ["sample-0.mp4", "samples.png"]
            (entry,) = client.get_metric_history(run.info.run_id, "validation_gain")
            assert entry.step == 2
    artifacts = {a.path for a in client.list_artifacts(children["evaluate"].info.run_id)}
    assert artifacts == {"evaluation.json", "metrics.md", "sample.mp4", "side_by_side.png"}
    read = {e.dataset.name: e.tags[0].value for e in parent.inputs.dataset_inputs}
    assert read == {"train": "training", "heldout": "evaluation"}
    assert parent.info.experiment_id == result.experiment_id
    (pairs,) = children["encode"].inputs.dataset_inputs
    assert (pairs.dataset.name, pairs.tags[0].value) == ("pairs", "encoding")
    for stage in ("encode", "register"):
        assert len(children[stage].inputs.model_inputs) == 1
    (judged,) = children["evaluate"].inputs.model_inputs
    (made,) = children["distill"].outputs.model_outputs
    assert version.source == f"models:/{made.model_id}" == f"models:/{judged.model_id}"
    card = read_card(result.model)
    assert card["parent"]["path"].endswith("models/causal")
    assert card["dataset"]["uri"].endswith("data/encoded")


def test_second_run_reuses_every_stage_without_ray(
    first: tuple[PipelineResult, StageView],
    folder: Path,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.stages.chain.ray_session", None)  # calling it would raise
    result, view = go(configured(folder, database))
    assert view.reused == list(STAGES)
    assert result.model == first[0].model
    assert result.version == first[0].version
    parent = client_for(database).get_run(result.run_id)
    assert {f"liveedit.reused.{stage}" for stage in STAGES} <= parent.data.tags.keys()


def test_changed_input_runs_that_stage_and_what_depends_on_it(
    first: tuple[PipelineResult, StageView],
    folder: Path,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.stages.chain.ray_session", None)
    _, view = go(configured(folder, database, "evaluate.clips=1", "foundation.log_every=5"))
    assert set(view.finished) - set(view.reused) == {"evaluate"}
    aliases = ["tracking.alias=canary", "evaluate.min_gain_db=-100"]
    aliases.append("evaluate.min_background_db=-100")
    result, view = go(configured(folder, database, *aliases))
    assert result.aliases == ["canary", "production"]
    assert resolve("models:/liveedit@production", database) == result.model


def test_result_page_and_edit_by_alias(
    first: tuple[PipelineResult, StageView], folder: Path, database: str
) -> None:
    page = StringIO()
    run_train(configured(folder, database), Console(file=page, width=300))
    assert f"mlflow ui --backend-store-uri {database}" in page.getvalue()
    assert str(first[0].picture) in page.getvalue()
    source = folder / "in.mp4"
    from data.synthetic import make_pair
    from data.video import VideoWriter

    pair = make_pair(0, height=48, width=64, frames=20, split="heldout")
    with VideoWriter(source, 64, 48, 16) as writer:
        writer.write(pair.source)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pipelines", "edit", "in.mp4", "out.mp4"),
            *("--prompt", pair.instruction, "--model", "models:/liveedit@candidate"),
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": database},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert probe(folder / "out.mp4").frames == 20
