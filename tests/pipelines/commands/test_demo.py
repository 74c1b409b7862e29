"""What the demo edits, serves and says, without the hours that lie before it."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data.synthetic import is_heldout
from data.video import probe
from infra.runtime.registry import client_for
from pipelines.commands.run import print_result
from pipelines.config.load import load_config
from pipelines.stages.edit import VIDEO_FRAMES, edit_heldout, heldout_video
from pipelines.stages.live import served_reference
from pipelines.stages.progress import StageView
from pipelines.stages.register import PipelineResult
from pipelines.stages.runner import StageRunner
from pipelines.tracking.outbox import Outbox
from tests.known_editors import UNCHANGED, expected_edit, write_known_model
from tests.pipelines.stages.test_edit_file import read


def result_of(
    output: Path, model: Path, *aliases: str, shortfalls: tuple[str, ...] = ()
) -> PipelineResult:
    return PipelineResult(
        output=output, model=model, version="7", aliases=list(aliases),
        shortfalls=list(shortfalls), metrics={"gain": 1.25}, report=output / "evaluation.json",
        table=output / "metrics.md", picture=output / "side.png", run_id="run",
    )  # fmt: skip


def test_the_video_is_one_that_no_training_shows_at_the_model_s_size(tmp_path: Path) -> None:
    pair = heldout_video(write_known_model(tmp_path / "model", height=48, width=80, fps=12))
    origin = pair.origin
    assert is_heldout(origin["edit"], origin["shape"], origin["color"], origin["to"])
    assert pair.video_shape == (VIDEO_FRAMES, 48, 80)
    assert pair.fps == 12


def test_the_model_edits_the_video_once(
    tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stages.edit.VIDEO_FRAMES", 21)
    monkeypatch.setattr("pipelines.stages.edit.VIDEO_SEED", 7)  # turn the red star orange
    model = write_known_model(tmp_path / "model", height=32, width=48)
    result = result_of(tmp_path / "out", model, "candidate")

    def edited() -> list[str]:
        with (
            Outbox(result.output, mlflow_uri, "test", pytest.fail) as outbox,
            StageView(Console(file=StringIO()), ("edit",)) as view,
        ):
            parent = outbox.start_pipeline("test", {})
            edit_heldout(StageRunner(result.output, parent, view), result)
        return view.reused

    result.output.mkdir()
    assert edited() == []
    pair = heldout_video(model)
    source, out = result.output / "source.mp4", result.output / "edited.mp4"
    assert probe(out).fps == probe(source).fps == pair.fps
    assert np.abs(read(source) - pair.source).mean() < 5  # 4:2:0 at 32 x 48
    # The instruction's words paint where it is light; the source's own detail is kept.
    painted, same = (
        expected_edit(pair.source, prompt).astype(int) for prompt in (pair.instruction, UNCHANGED)
    )
    wanted = np.clip(pair.source + painted - same, 0, 255)  # the source's detail is kept
    assert np.abs(wanted - pair.source).mean() > 10
    assert np.abs(read(out) - wanted).mean() < 8  # both, and a soft border of the paint
    assert edited() == ["edit"]
    source.unlink()
    assert edited() == []
    write_known_model(model, height=32, width=64)
    assert edited() == []
    client = client_for(mlflow_uri)
    experiment = client.get_experiment_by_name("test")
    runs = client.search_runs([experiment.experiment_id], "tags.`liveedit.stage` = 'edit'")
    assert [run.data.metrics["frames"] for run in runs] == [21] * 3
    assert [file.path for file in client.list_artifacts(runs[0].info.run_id)] == ["edited.mp4"]


@pytest.mark.parametrize("aliases", [("candidate",), ("candidate", "production")])
def test_production_is_served_if_there_is_one(
    tmp_path: Path, mlflow_uri: str, aliases: tuple[str, ...]
) -> None:
    config = load_config("demo", [f"tracking.uri={mlflow_uri}", "tracking.model_name=mine"])
    found = served_reference(config, result_of(tmp_path, tmp_path, *aliases))
    assert found == f"models:/mine@{aliases[-1]}"


@pytest.mark.parametrize("shortfalls", [(), ("gain 1.0 dB is below 4 dB", "background too")])
def test_the_page_says_where_everything_is_and_why_it_was_not_promoted(
    tmp_path: Path, mlflow_uri: str, shortfalls: tuple[str, ...]
) -> None:
    page = StringIO()
    config = load_config("demo", [f"tracking.uri={mlflow_uri}"])
    result = result_of(tmp_path, tmp_path / "m", "candidate", "canary", shortfalls=shortfalls)
    print_result(config, result, Console(file=page, width=300))
    for words in (
        f"{tmp_path / 'm'}  (version 7: models:/liveedit@candidate, models:/liveedit@canary)",
        f"{tmp_path / 'metrics.md'}, {tmp_path / 'evaluation.json'}",
        str(tmp_path / "side.png"),
        "1.2 dB",
        f"mlflow ui --backend-store-uri {mlflow_uri}",
        "/#/runs/run?workflowType=machine_learning",
        "/#/models/liveedit/versions/7?workflowType=machine_learning",
    ):
        assert words in page.getvalue()
    said = (
        "not promoted to production: gain 1.0 dB is below 4 dB; background too" in page.getvalue()
    )
    assert said == bool(shortfalls)
    remote = load_config("demo", ["tracking.uri=http://tracking:5000"])
    print_result(remote, result, Console(file=page, width=300))
    assert "runs     http://tracking:5000" in page.getvalue()
