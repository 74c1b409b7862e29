"""What the demo edits, serves and says, without the hours that lie before it."""

from __future__ import annotations

import json
import webbrowser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data.bench.clip import OWN_FOOTAGE
from data.footage.material import names_by_split, read_heldout
from data.synthetic import make_pair
from data.video import VideoWriter, probe
from infra.runtime.paths import find_path
from infra.runtime.registry import client_for
from pipelines.commands.made import open_page, write_page
from pipelines.commands.run import print_result
from pipelines.config.load import load_config
from pipelines.stages.edit import CLIP, edit_sample
from pipelines.stages.live import served_reference
from pipelines.stages.register import PipelineResult
from pipelines.stages.running.progress import StageView
from pipelines.stages.running.runner import StageRunner
from pipelines.tracking.outbox import Outbox
from serve.front.front import SAMPLES
from tests.known_editors import UNCHANGED, expected_edit, write_known_model
from tests.pipelines.stages.test_edit_file import read


def result_of(
    output: Path, model: Path, *aliases: str, shortfalls: tuple[str, ...] = ()
) -> PipelineResult:
    return PipelineResult(
        output=output, model=model, version="7", aliases=list(aliases),
        shortfalls=list(shortfalls), metrics={"gain": 1.25}, report=output / "evaluation.json",
        table=output / "metrics.md", picture=output / "side.png", run_id="run",
        experiment_id="3",
    )  # fmt: skip


def test_the_video_is_real_and_no_training_of_the_demo_sees_it() -> None:
    footage = find_path(str(load_config("demo", []).data.footage))
    split = names_by_split(footage)
    assert CLIP.name in split["heldout"]
    assert CLIP.is_relative_to(footage)
    heldout_by_the_benchmark = read_heldout(OWN_FOOTAGE) or frozenset()
    assert not heldout_by_the_benchmark & set(split["train"])
    shown = json.loads((SAMPLES / "samples.json").read_text())
    assert all((SAMPLES / sample["file"]).is_file() for sample in shown.values())


def test_the_model_edits_the_video_once(
    tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stages.edit.PROMPT", "turn the red star orange")
    model = write_known_model(tmp_path / "model", height=32, width=48)
    result = result_of(tmp_path / "out", model, "candidate")
    pair = make_pair(7, height=32, width=48, frames=21, split="heldout")
    clip = tmp_path / "clip.mp4"
    with VideoWriter(clip, 48, 32, pair.fps) as writer:
        writer.write(pair.source)

    def edited() -> list[str]:
        with (
            Outbox(result.output, mlflow_uri, "test", pytest.fail) as outbox,
            StageView(Console(file=StringIO()), ("edit",)) as view,
        ):
            parent = outbox.start_pipeline("test", {})
            edit_sample(StageRunner(result.output, parent, view), result, clip)
        return view.reused

    result.output.mkdir()
    assert edited() == []
    source, out = result.output / "source.mp4", result.output / "edited.mp4"
    assert source.read_bytes() == clip.read_bytes()
    assert probe(out).fps == pair.fps
    # The instruction's words paint where it is light; the source's own detail is kept.
    painted, same = (
        expected_edit(read(source), prompt).astype(int)
        for prompt in ("turn the red star orange", UNCHANGED)
    )
    wanted = np.clip(read(source) + painted - same, 0, 255)  # the source's detail is kept
    assert np.abs(wanted - read(source)).mean() > 10
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


def test_what_it_made_is_opened_where_somebody_sits_before_a_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    page = write_page(result_of(tmp_path, tmp_path / "<model>", "candidate"))
    text = page.read_text()
    for shown in ("source.mp4", "edited.mp4", "live.mp4", "side.png", "&lt;model&gt;", "1.2 dB"):
        assert shown in text
    terminal = Console(file=StringIO(), force_terminal=True)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # asked for anew
    assert not open_page(page, terminal)  # of a server: there is no screen
    monkeypatch.setenv("BROWSER", str(browser))
    assert not open_page(page, Console(file=StringIO()))  # of a job: nobody looks
    assert not opened.exists()
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        with monkeypatch.context() as patch:
            patch.delenv("BROWSER")
            patch.setenv(name, ":0")
            patch.setattr(webbrowser, "open", lambda address: True)
            assert open_page(page, terminal), name
    assert open_page(page, terminal)
    assert opened.read_text().strip() == page.as_uri()


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
        "/#/experiments/3/runs/run?workflowType=machine_learning",
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
