"""What registering leaves, in the registry and where it was started."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from data.video import VideoWriter
from infra.runtime.registry import (
    FINGERPRINT,
    LOCATION,
    client_for,
)
from modeling.fingerprint import FingerprintError, model_fingerprint
from modeling.model_dir import read_card
from pipelines.stages.register import publish
from pipelines.tracking import registry
from pipelines.tracking.outbox import Outbox
from pipelines.tracking.tracker import Tracker
from tests.pipelines.tracking.registered import changed, register


def test_aliases_move_to_the_newest_and_lead_to_its_files(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    shutil.copytree(tiny_model, second)
    assert register(mlflow_uri, tiny_model, "candidate", "production") == "1"
    assert register(mlflow_uri, second, "candidate") == "2"
    assert registry.resolve("models:/liveedit@production", mlflow_uri) == tiny_model
    assert registry.resolve("models:/liveedit@candidate", mlflow_uri) == second
    assert registry.resolve("models:/liveedit/1", mlflow_uri) == tiny_model


def test_a_version_s_page_says_what_it_is(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    picture, video = tmp_path / "side_by_side.png", tmp_path / "sample.mp4"
    Image.new("RGB", (1236, 900), "navy").save(picture)
    with VideoWriter(video, 1000, 100, 16) as writer:
        writer.write(np.stack([np.full((100, 1000, 3), 20 * n, np.uint8) for n in range(9)]))
    run = Tracker.start_pipeline(mlflow_uri, "liveedit", "demo", {})
    run.log_input("heldout", "s3://bucket/heldout", "abc123", "evaluation")
    number = registry.register(
        mlflow_uri,
        "liveedit",
        tiny_model,
        run_id=run.run_id,
        fingerprint=model_fingerprint(tiny_model),
        metrics={"gain": 4.5},
        aliases=("candidate",),
        judged_on=("heldout", "abc123"),
        shown=[picture, video],
    )
    client = client_for(mlflow_uri)
    version = client.get_model_version("liveedit", number)
    assert f"liveedit serve models:/liveedit/{number}" in version.description
    assert "| gain | 4.5 |" in version.description
    model_id = version.source.removeprefix("models:/")
    at = f"ajax-api/2.0/mlflow/logged-models/{model_id}/artifacts/files?artifact_file_path="
    small = ["side_by_side-small.png", "sample-small.webp"]
    for name, shown in (("side_by_side.png", small[0]), ("sample.mp4", small[1])):
        assert f"[![{name}]({at}{shown})]({at}{name})" in version.description
    for name, value in read_card(tiny_model).items():
        assert f"| {name} | {value} |" in version.description
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert json.loads(model.tags["mlflow.modelVersions"]) == [
        {"name": "liveedit", "version": number}
    ]
    assert model.params == {name: str(value) for name, value in read_card(tiny_model).items()}
    (metric,) = model.metrics
    assert (metric.key, metric.value) == ("gain", 4.5)
    assert (metric.dataset_name, metric.dataset_digest) == ("heldout", "abc123")
    files = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
    assert files == {"MLmodel", "card.json", "side_by_side.png", "sample.mp4", *small}
    folder = Path(model.artifact_location.removeprefix("file://"))
    with Image.open(folder / small[0]) as still, Image.open(folder / small[1]) as film:
        assert still.size == (720, 524)  # MLflow's column is 764 pixels, and shows no part of more
        assert film.size == (720, 72)
        assert film.n_frames == 9  # it plays, which MLflow lets no video do
        film.seek(8)
        assert abs(np.asarray(film).astype(int) - 160).max() < 12
    (used,) = client.get_run(run.run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("heldout", "abc123")
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "evaluation")]


def test_registering_leaves_nothing_where_it_was_started(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That folder may belong to somebody else, as in a container."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as made, made:
        # As in a database that was made here: its default experiment lies in this folder.
        places = made.execute("update experiments set artifact_location = ?", [f"{here}/mlruns/0"])
        assert places.rowcount == 1
    register(mlflow_uri, tiny_model)
    assert not list(here.iterdir())


def test_same_model_is_not_registered_twice(mlflow_uri: str, tiny_model: Path) -> None:
    assert register(mlflow_uri, tiny_model, "candidate") == "1"
    assert register(mlflow_uri, tiny_model, "production") == "1"
    assert registry.resolve("models:/liveedit@production", mlflow_uri) == tiny_model
    assert registry.holds(mlflow_uri, "liveedit", "1", tiny_model)
    assert not registry.holds(mlflow_uri, "liveedit", "2", tiny_model)


@pytest.mark.parametrize("other", ["place", "content"])
def test_an_entry_is_the_same_only_with_its_place_and_its_content(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path, other: str
) -> None:
    second = tmp_path / "second"
    shutil.copytree(tiny_model, second)
    model = tmp_path / "first"
    shutil.copytree(tiny_model, model)
    assert register(mlflow_uri, model, "candidate") == "1"
    if other == "place":
        assert register(mlflow_uri, second, "candidate") == "2"
        assert registry.resolve("models:/liveedit@candidate", mlflow_uri) == second
        assert not registry.holds(mlflow_uri, "liveedit", "2", model)
        assert registry.resolve("models:/liveedit/1", mlflow_uri) == model
        # The same files are one model, whose page leads to both and to where they lie now.
        client = client_for(mlflow_uri)
        (logged,) = {client.get_model_version("liveedit", number).source for number in "12"}
        tags = client.get_logged_model(logged.removeprefix("models:/")).tags
        assert [told["version"] for told in json.loads(tags["mlflow.modelVersions"])] == ["1", "2"]
        assert tags[LOCATION] == str(second)
    else:
        weights = load_file(model / "vae.safetensors")
        weights[min(weights)] += 1
        save_file(weights, model / "vae.safetensors")
        assert register(mlflow_uri, model, "candidate") == "2"
        assert registry.resolve("models:/liveedit@candidate", mlflow_uri) == model
        with pytest.raises(FingerprintError):
            registry.resolve("models:/liveedit/1", mlflow_uri)
    assert not registry.holds(mlflow_uri, "liveedit", "1", second)
    assert not registry.holds(mlflow_uri, "another", "1", model)


def test_names_do_not_share_their_versions(mlflow_uri: str, tiny_model: Path) -> None:
    run = Tracker.start_pipeline(mlflow_uri, "liveedit", "demo", {})
    for name, fingerprint in (("one", "a"), ("two", "b"), ("two", "c")):
        registry.register(
            mlflow_uri, name, tiny_model, run_id=run.run_id, fingerprint=fingerprint,
            metrics={}, aliases=(),
        )  # fmt: skip
    client = client_for(mlflow_uri)
    for name, version, fingerprint in (("one", "1", "a"), ("two", "1", "b"), ("two", "2", "c")):
        tags = client.get_model_version(name, version).tags
        assert tags[FINGERPRINT] == fingerprint
        assert tags[LOCATION] == str(tiny_model)
    assert not client.get_registered_model("two").aliases


def test_version_points_back_at_its_run_and_uploads_nothing(
    mlflow_uri: str, tiny_model: Path
) -> None:
    register(mlflow_uri, tiny_model)
    client = client_for(mlflow_uri)
    version = client.get_model_version("liveedit", "1")
    run = client.get_run(version.run_id)
    assert run.info.run_name == "demo"
    assert version.tags["metric.gain"] == "4.5"
    store = Path(mlflow_uri.removeprefix("sqlite:///")).parent
    assert not list(store.rglob("*.safetensors"))


def test_a_version_is_a_copy_that_nobody_writes_again(tiny_model: Path, tmp_path: Path) -> None:
    trained, version = tmp_path / "trained", tmp_path / "versions" / "one"
    shutil.copytree(tiny_model, trained)
    publish(trained, version)
    assert model_fingerprint(version) == model_fingerprint(tiny_model)
    assert read_card(version) == read_card(tiny_model)
    modes = {file.stat().st_mode & 0o777 for file in version.rglob("*") if file.is_file()}
    assert modes == {0o444}  # read by all, as by a server of another user's
    publish(trained, version)  # the same once more
    shutil.rmtree(trained)
    publish(changed(tiny_model, trained), tmp_path / "versions" / "two")
    assert model_fingerprint(version) == model_fingerprint(tiny_model)
    with pytest.raises(FingerprintError, match=rf"version in {version} is not what was registered"):
        publish(trained, version)
    assert [path.name for path in sorted(version.parent.iterdir())] == ["one", "two"]


def test_a_copy_that_went_wrong_is_no_version(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree

    def cut_off(source: Path, target: Path) -> None:
        copy(source, target)
        weights = target / "transformer.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(shutil, "copytree", cut_off)
    with pytest.raises(FingerprintError, match=rf"the copy of {tiny_model}"):
        publish(tiny_model, tmp_path / "versions" / "one")
    assert list((tmp_path / "versions").iterdir()) == []


def test_registering_leaves_no_address_behind(
    tmp_path: Path, tiny_model: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Outbox(tmp_path, mlflow_uri, "test", print) as outbox:
        run = outbox.start_pipeline("demo", {})
        run.register(
            "mine",
            tiny_model,
            fingerprint=model_fingerprint(tiny_model),
            metrics={},
            aliases=["candidate"],
        )
        run.finish()
    assert registry.resolve("models:/mine@candidate", mlflow_uri) == tiny_model
    assert "MLFLOW_TRACKING_URI" not in os.environ
