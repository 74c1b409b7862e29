"""An outbox before real MLflow servers that are dead, die, hang, come back and refuse."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.entities import Run as MlflowRun
from PIL import Image

from infra.runtime.registry import client_for
from modeling.fingerprint import model_fingerprint
from pipelines.commands.send import send
from pipelines.config.load import to_yaml
from pipelines.config.pipeline import PipelineConfig
from pipelines.tracking import outbox, registry
from pipelines.tracking.outbox import Outbox
from pipelines.tracking.tracker import TrackingError
from tests.pipelines.mlflow_server import free_port, mlflow_server

ROOT = Path(__file__).parents[2]


def tell_all(outbox: Outbox, model: Path) -> None:
    """A pipeline with one stage, from its begin to a registered model."""
    parent = outbox.start_pipeline("demo", {"data": {"pairs": 4}})
    stage = parent.start_stage("vae", {"steps": 2}, "key")
    stage.log_input("train", str(model), "training")  # anything that has a hash
    stage.log_metrics({"loss": 2.0}, step=1)
    picture = outbox.output / "picture.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    stage.log_artifact(picture)
    Image.new("RGB", (8, 8), "blue").save(picture)
    stage.log_metrics({"loss": 1.0}, step=2)
    stage.finish()
    parent.reused("data", stage.mark)
    fingerprint = model_fingerprint(model)
    parent.register(
        "liveedit",
        model,
        fingerprint=fingerprint,
        metrics={"gain": 5.0},
        aliases=["candidate"],
        judged_on=("heldout", "abc123"),
        shown=[picture],
    )
    picture.unlink()
    parent.finish()


def check_all(uri: str, model: Path, folder: Path) -> None:
    runs = all_runs(uri)
    assert sorted(runs) == ["demo", "vae"]
    parent, stage = runs["demo"], runs["vae"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    # As it was, however late it is told.
    assert parent.info.start_time <= stage.info.start_time <= stage.info.end_time
    assert stage.info.end_time <= parent.info.end_time
    assert parent.data.params == {"data.pairs": "4"}
    assert parent.data.tags["liveedit.reused.data"] == stage.info.run_id
    assert (
        f"/runs/{stage.info.run_id}?workflowType=machine_learning)"
        in parent.data.tags["mlflow.note.content"]
    )
    assert parent.data.tags["mlflow.note.content"].startswith("From pairs to a registered model")
    assert stage.data.tags["mlflow.note.content"].startswith("Trains the VAE")
    assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert stage.data.tags["liveedit.commit"]
    client = client_for(uri)
    history = client.get_metric_history(stage.info.run_id, "loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 2.0), (2, 1.0)]
    copy = client.download_artifacts(stage.info.run_id, "picture.png", str(folder))
    with Image.open(copy) as first:
        assert first.getpixel((0, 0)) == (255, 0, 0)
    assert registry.resolve("models:/liveedit@candidate", uri) == model
    assert len(registry.versions("liveedit", uri)) == 1
    (version,) = registry.versions("liveedit", uri)
    assert version.run_id == parent.info.run_id
    (used,) = stage.inputs.dataset_inputs
    digest = model_fingerprint(model)[:12]
    assert (used.dataset.name, used.dataset.digest) == ("train", digest)
    shown = client.get_logged_model(version.source.removeprefix("models:/"))
    assert [(m.dataset_name, m.dataset_digest) for m in shown.metrics] == [("heldout", "abc123")]
    assert shown.tags["mlflow.note.content"] == version.description
    assert f"Made by {getpass.getuser()} with `" in version.description
    files = {file.path for file in client.list_logged_model_artifacts(shown.model_id)}
    assert files == {"MLmodel", "card.json", "picture.png", "picture-small.png"}


def all_runs(uri: str) -> dict[str, MlflowRun]:
    client = client_for(uri)
    experiment = client.get_experiment_by_name("liveedit")
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {str(run.info.run_name): run for run in found}


def test_everything_arrives_and_the_same_again_changes_nothing(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    with Outbox(tmp_path, mlflow_uri, "liveedit", said.append) as outbox:
        tell_all(outbox, tiny_model)
        assert outbox.flush()
        assert outbox.version("liveedit", model_fingerprint(tiny_model)) == "1"
    check_all(mlflow_uri, tiny_model, tmp_path)
    entries = [json.loads(line) for line in outbox.journal.read_text().splitlines()]
    for entry in entries:  # as if no answer had come
        if entry["what"] == "artifact":
            file = tmp_path / "tracking" / "files" / entry["file"]
            assert not file.exists(), "a sent file is kept"
            file.parent.mkdir()
            Image.new("RGB", (8, 8), "red").save(file)
    (tmp_path / "tracking" / "state.json").unlink()
    with Outbox(tmp_path, mlflow_uri, "liveedit", said.append):
        pass
    check_all(mlflow_uri, tiny_model, tmp_path)
    assert not said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_dies_misses_nothing_and_is_told_by_one_command(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    config = PipelineConfig(output=str(tmp_path))
    config.tracking.uri = address
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with Outbox(tmp_path, address, "liveedit", said.append) as outbox:
        with mlflow_server(mlflow_uri, tmp_path, port):
            before = outbox.start_pipeline("before", {})
            assert before.run_id == all_runs(address)["before"].info.run_id  # is waited for
            before.finish()
            assert outbox.flush()
            assert "View run" not in capsys.readouterr().out, "MLflow's own addresses"
        tell_all(outbox, tiny_model)
        assert not outbox.flush()
        outbox.start_pipeline("after", {}).finish()
    assert len(said) == 2, said
    assert f"MLflow at {address} does not answer" in said[0]
    assert "Connection refused" in said[0]
    assert said[1].endswith(f"`liveedit send {tmp_path}` sends it")
    with pytest.raises(TrackingError, match="does not answer"):
        send(tmp_path)
    with mlflow_server(mlflow_uri, tmp_path, port):
        send(tmp_path)
        runs = all_runs(address)
        assert set(runs) == {"before", "demo", "vae", "after"}
        client = client_for(address)
        for name in ("before", "after"):
            client.delete_run(runs[name].info.run_id)
        check_all(address, tiny_model, tmp_path)


def test_a_server_that_never_answers_is_not_waited_for(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "PATIENCE_S", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")  # longer than this test may last
    said: list[str] = []
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Outbox(tmp_path, address, "liveedit", said.append) as box:
            tell_all(box, tiny_model)
            held, _ = silent.accept()  # the request is under way
            assert box.start_pipeline("another", {}).run_id
        held.close()
    assert [line.partition(";")[0] for line in said] == [
        f"MLflow at {address} does not have all of this yet (no answer)"
    ]
    written = (tmp_path / "tracking" / "journal.jsonl").read_text().splitlines()
    assert len(written) == 11


SCRIPT = """
import os, signal, sys
from pathlib import Path
from pipelines.tracking.outbox import Outbox
with Outbox(Path(sys.argv[1]), sys.argv[2], "liveedit", print) as outbox:
    assert outbox.flush()  # when all is imported that a database needs, which is not its silence
    assert "mlflow.store.tracking.sqlalchemy_store" in sys.modules
    parent = outbox.start_pipeline("killed", {})
    parent.start_stage("vae", {}, "key").log_metrics({"loss": 2.0}, step=1)
    parent.start_stage("start", {}, "key").finish()
    assert outbox.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # starts one that is killed
def test_a_killed_process_leaves_no_run_running(mlflow_uri: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), mlflow_uri]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    runs = all_runs(mlflow_uri)
    assert {name: run.info.status for name, run in runs.items()} == {
        "killed": "RUNNING",
        "vae": "RUNNING",
        "start": "FINISHED",
    }
    config = PipelineConfig(output=str(tmp_path))
    config.tracking.uri = mlflow_uri
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    send(tmp_path)
    assert {name: run.info.status for name, run in all_runs(mlflow_uri).items()} == {
        "killed": "KILLED",
        "vae": "KILLED",
        "start": "FINISHED",
    }


def test_what_mlflow_refuses_holds_nothing_up_and_can_be_sent_once_it_is_mended(
    outbox: Outbox, mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = outbox.start_pipeline("demo", {})
    run.log_metrics({"a name | that MLflow does not take": 1.0})
    run.log_metrics({"loss": 1.0})
    assert outbox.flush()
    assert all_runs(mlflow_uri)["demo"].data.metrics == {"loss": 1.0}
    assert len(outbox.refused) == 1
    assert "a name | that MLflow does not take" in outbox.refused[0]
    aside = tmp_path / "tracking" / "refused.jsonl"
    aside.write_text(aside.read_text().replace("a name | that MLflow does not take", "psnr"))
    outbox.refused.clear()
    outbox.put_refused_back()
    assert outbox.flush()
    assert all_runs(mlflow_uri)["demo"].data.metrics == {"loss": 1.0, "psnr": 1.0}


def test_a_torn_last_line_is_left_out(mlflow_uri: str, tmp_path: Path) -> None:
    said: list[str] = []
    with Outbox(tmp_path, mlflow_uri, "liveedit", said.append) as box:
        box.start_pipeline("demo", {}).finish()
    with box.journal.open("a") as file:
        file.write('{"what": "metr')
    with Outbox(tmp_path, mlflow_uri, "liveedit", said.append) as box:
        box.start_pipeline("next", {}).finish()
    assert not said
    assert set(all_runs(mlflow_uri)) == {"demo", "next"}


def test_after_a_journal_that_was_lost_all_that_is_new_is_sent(
    mlflow_uri: str, tmp_path: Path
) -> None:
    """The machine went down: what had been sent is known, the journal is as it was before."""
    said: list[str] = []
    with Outbox(tmp_path, mlflow_uri, "liveedit", said.append) as box:
        box.start_pipeline("demo", {"much": "x" * 2000}).finish()
    box.journal.write_bytes(b"")
    with Outbox(tmp_path, mlflow_uri, "liveedit", said.append) as box:
        box.start_pipeline("next", {}).finish()
    assert not said
    assert {name: run.info.status for name, run in all_runs(mlflow_uri).items()} == {
        "demo": "FINISHED", "next": "FINISHED",
    }  # fmt: skip


def test_a_sent_journal_begins_anew(mlflow_uri: str, tmp_path: Path) -> None:
    said: list[str] = []
    for name in ("one", "two"):
        with Outbox(tmp_path, mlflow_uri, "liveedit", said.append) as box:
            box.start_pipeline(name, {}).finish()
    assert [json.loads(line).get("name") for line in box.journal.read_text().splitlines()] == [
        "two",
        None,
    ]
    shutil.rmtree(tmp_path / "tracking")


@pytest.mark.parametrize(("error", "patience"), [(None, 10.0), (KeyboardInterrupt(), 3.0)])
def test_after_an_error_the_end_waits_less(
    error: BaseException | None, patience: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    box = Outbox(tmp_path, "http://127.0.0.1:9", "liveedit", lambda line: None)
    monkeypatch.setattr(box, "flush", lambda patience: asked.append(patience))
    with contextlib.suppress(KeyboardInterrupt), box:
        if error is not None:
            raise error
    assert asked == [patience]
