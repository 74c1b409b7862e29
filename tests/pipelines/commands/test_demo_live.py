"""The demo's last stages, with the real Ray Serve and sockets."""

from __future__ import annotations

from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from data.video import probe, read_frames
from infra.runtime.registry import client_for
from modeling.fingerprint import model_fingerprint
from pipelines.commands.run import serving_demo
from pipelines.config.load import load_config
from pipelines.stages.edit import edit_sample
from pipelines.stages.live import served_reference, stream_live
from pipelines.stages.register import PipelineResult
from pipelines.stages.running.progress import StageView
from pipelines.stages.running.runner import StageRunner
from pipelines.tracking.outbox import Outbox
from tests.serve.models import save_small_model


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_candidate_is_served_and_streamed_once(
    tmp_path: Path, mlflow_uri: str, outbox: Outbox
) -> None:
    model = save_small_model(tmp_path / "small")
    config = load_config("demo", [f"output={tmp_path}", f"tracking.uri={mlflow_uri}"])
    parent = outbox.start_pipeline("test", {})
    name, fingerprint = config.tracking.model_name, model_fingerprint(model)
    parent.register(name, model, fingerprint=fingerprint, metrics={}, aliases=["candidate"])
    assert outbox.flush()
    result = PipelineResult(
        output=tmp_path, model=model, version=outbox.version(name, fingerprint),
        aliases=["candidate"], shortfalls=["gain"], metrics={}, report=tmp_path, table=tmp_path,
        picture=tmp_path, run_id=parent.run_id, experiment_id=parent.experiment_id,
    )  # fmt: skip
    client = client_for(mlflow_uri)
    assert served_reference(config, result) == "models:/liveedit@candidate"
    version = client.get_model_version("liveedit", result.version)
    assert result.experiment_id == client.get_run(result.run_id).info.experiment_id

    view = StageView(Console(file=StringIO()), ("edit", "live"))
    with view:
        runner = StageRunner(tmp_path, parent, view)
        edit_sample(runner, result)
        serving = partial(serving_demo, config)
        record = stream_live(runner, result, config, serving)
        assert view.reused == []
        again = stream_live(runner, result, config, serving)
    assert view.reused == ["live"]
    assert again.metrics == record.metrics

    video = tmp_path / "live.mp4"
    source = probe(tmp_path / "source.mp4")
    assert len(list(read_frames(video))) == source.frames
    assert probe(video).fps == source.fps
    numbers = record.metrics
    assert numbers["edited"] + numbers["dropped"] == source.frames
    assert numbers["first_chunk_s"] > 0
    assert numbers["fps"] > 0
    assert outbox.flush()
    stages = client.search_runs([result.experiment_id], "tags.`liveedit.kind` = 'stage'")
    assert {stage.info.run_name for stage in stages} == {"edit", "live"}
    for stage in stages:  # whose search leaves out which models a run used
        (used,) = client.get_run(stage.info.run_id).inputs.model_inputs
        assert used.model_id == version.source.removeprefix("models:/")
