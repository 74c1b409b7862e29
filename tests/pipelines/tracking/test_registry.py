from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from data.video import VideoWriter
from infra.runtime.registry import (
    FINGERPRINT,
    LOCATION,
    Pointed,
    RegistryError,
    client_for,
    find_version,
    pointed,
)
from modeling.fingerprint import FingerprintError, model_fingerprint
from modeling.model_dir import read_card
from pipelines import cli
from pipelines.stages.register import publish
from pipelines.tracking import registry
from pipelines.tracking.outbox import Outbox
from pipelines.tracking.records import Records, StageRecord
from pipelines.tracking.tracker import Tracker
from serve.versions.source import find_model


def register(uri: str, model: Path, *aliases: str, fingerprint: str = "") -> str:
    run = Tracker.start_pipeline(uri, "liveedit", "demo", {})
    return registry.register(
        uri,
        "liveedit",
        model,
        run_id=run.run_id,
        fingerprint=fingerprint or model_fingerprint(model),
        metrics={"gain": 4.5},
        aliases=aliases,
    )


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
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That folder may belong to somebody else, as in a container."""
    here, store = tmp_path / "here", tmp_path / "store"
    here.mkdir()
    store.mkdir()
    monkeypatch.chdir(here)
    # A database made from here on: its default experiment lies in this folder.
    register(f"sqlite:///{store / 'mlflow.db'}", tiny_model)
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


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/liveedit@prod", r"not in the registry .*, which holds liveedit"),
        ("models:/other@production", r"not in the registry .*, which holds liveedit"),
        ("models:/liveedit/7", r"not in the registry"),
        ("models:/liveedit", r"no model reference; write models:/liveedit@production"),
        ("models:/liveedit/1@candidate", r"no model reference|not in the registry"),
        ("models:/@candidate", r"no model reference"),
        ("models:/", r"no model reference"),
    ],
)
def test_unknown_references(
    mlflow_uri: str, tiny_model: Path, reference: str, message: str
) -> None:
    register(mlflow_uri, tiny_model, "candidate")
    with pytest.raises(RegistryError, match=message):
        registry.resolve(reference, mlflow_uri)


def test_files_that_are_gone_are_named(mlflow_uri: str, tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    register(mlflow_uri, copy, "candidate")
    shutil.rmtree(copy)
    with pytest.raises(RegistryError, match=rf"files lie at {copy}, which cannot be read here"):
        registry.resolve("models:/liveedit@candidate", mlflow_uri)


def test_without_a_name_the_demo_s_model_is_meant(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(registry, "ROOT", tmp_path / "tree")
    with pytest.raises(RegistryError, match="run `liveedit demo`"):
        registry.locate(None)
    shutil.copytree(tiny_model, tmp_path / "shipped")
    assert registry.locate(None) == tmp_path / "shipped"
    Records(Path("runs/demo")).write(StageRecord("register", "k", "f", str(tiny_model), "run"))
    assert registry.locate(None) == tiny_model
    shutil.rmtree(tmp_path / "runs")
    gone = StageRecord("register", "k", "f", str(tmp_path / "gone"), "run")
    Records(Path("runs/demo")).write(gone)  # its model was deleted
    assert registry.locate(None) == tmp_path / "shipped"
    assert registry.locate(str(tiny_model)) == tiny_model
    with pytest.raises(RegistryError, match=r"elsewhere is no model directory"):
        registry.locate("elsewhere")


def test_the_demo_s_model_is_meant_from_any_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "ROOT", tmp_path / "tree")
    demo, elsewhere = tmp_path / "tree" / "runs" / "demo", tmp_path / "elsewhere"
    model = shutil.copytree(tiny_model, demo / "models" / "distill")
    Records(demo).write(StageRecord("register", "k", "f", str(model), "run"))
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    chosen = registry.choose(None)
    assert (chosen.path, chosen.why) == (model, f"made by the last demo in {demo}")
    with pytest.raises(RegistryError, match=r"distill is no model directory"):
        registry.choose("runs/demo/models/distill")  # the tree's is not meant by another folder
    copied = shutil.copytree(demo, elsewhere / "runs" / "demo")
    assert registry.choose(None).path == copied / "models" / "distill", "a copy means its own model"
    shutil.rmtree(tmp_path / "tree")
    assert registry.choose(None).path == copied / "models" / "distill"
    shutil.rmtree(copied)
    assert "the model that ships" in registry.choose(None).why


def test_what_ships_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = registry.choose("pipelines/start/natural")
    assert (shipped.path, shipped.why) == (registry.SHIPPED, "which ships")


def changed(model: Path, target: Path) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(model, target)
    weights = load_file(target / "vae.safetensors")
    weights[min(weights)] += 1
    save_file(weights, target / "vae.safetensors")
    return target


def test_a_version_is_a_copy_that_nobody_writes_again(tiny_model: Path, tmp_path: Path) -> None:
    trained, version = tmp_path / "trained", tmp_path / "versions" / "one"
    shutil.copytree(tiny_model, trained)
    publish(trained, version)
    assert model_fingerprint(version) == model_fingerprint(tiny_model)
    assert read_card(version) == read_card(tiny_model)
    assert {file.stat().st_mode & 0o222 for file in version.rglob("*") if file.is_file()} == {0}
    publish(trained, version)  # the same once more
    shutil.rmtree(trained)
    publish(changed(tiny_model, trained), tmp_path / "versions" / "two")
    assert model_fingerprint(version) == model_fingerprint(tiny_model)
    with pytest.raises(FingerprintError, match=rf"version in {version} is not what was registered"):
        publish(trained, version)
    assert [path.name for path in sorted(version.parent.iterdir())] == ["one", "two"]


def test_every_look_at_a_version_compares_its_files(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = changed(tiny_model, tmp_path / "good"), changed(tiny_model, tmp_path / "bad")
    register(mlflow_uri, tiny_model, "production")
    weights = load_file(good / "transformer.safetensors")
    weights[min(weights)] += 1
    save_file(weights, good / "transformer.safetensors")
    assert register(mlflow_uri, good, "production") == "2"
    assert register(mlflow_uri, bad, "candidate") == "3"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    served = find_model("models:/liveedit@candidate")
    assert (served.directory, served.name) == (str(bad), "liveedit version 3")
    served.check()
    (bad / "config.json").write_text((bad / "config.json").read_text() + "\n")
    message = r"liveedit version 3 is not what was registered: the files in .*bad have"
    for look in (
        served.check,  # an editor that starts later
        lambda: find_model("models:/liveedit@candidate"),
        lambda: registry.resolve("models:/liveedit@candidate", mlflow_uri),
        lambda: registry.promote("models:/liveedit/3", "production", mlflow_uri),
    ):
        with pytest.raises(FingerprintError, match=message):
            look()
    assert registry.resolve("models:/liveedit@production", mlflow_uri) == good


def test_rollback_goes_back_as_often_as_an_alias_moved(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    models = [tiny_model, *(tmp_path / name for name in "abc")]
    for n, (model, before) in enumerate(zip(models[1:], models, strict=False)):
        shutil.copytree(before, model)
        (model / "note").write_text(str(n))
    for n, model in enumerate(models[:3], 1):
        assert register(mlflow_uri, model, "production", "candidate") == str(n)
    assert register(mlflow_uri, models[2], "production") == "3"  # again: nothing moves
    assert register(mlflow_uri, models[3], "candidate") == "4"
    assert registry.promote("models:/liveedit@candidate", "production", mlflow_uri).version == 4
    found = []
    for _ in range(3):
        found.append(int(registry.rollback("liveedit", "production", mlflow_uri).version))
        now = find_version("models:/liveedit@production", mlflow_uri)
        assert int(now.version) == found[-1]
    assert found == [3, 2, 1]
    with pytest.raises(RegistryError, match="is version 1 and was no other before"):
        registry.rollback("liveedit", "production", mlflow_uri)
    for number in (2, 1, 3):
        registry.promote(f"models:/liveedit/{number}", "production", mlflow_uri)
    found = [int(registry.rollback("liveedit", "production", mlflow_uri).version) for _ in "abc"]
    assert found == [1, 2, 1]
    assert registry.resolve("models:/liveedit@candidate", mlflow_uri) == models[3]


def test_rollback_to_files_that_were_changed_is_refused(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(tiny_model, first)
    register(mlflow_uri, first, "production")
    register(mlflow_uri, changed(tiny_model, tmp_path / "second"), "production")
    (first / "note").write_text("x")
    with pytest.raises(FingerprintError, match="liveedit version 1 is not what was registered"):
        registry.rollback("liveedit", "production", mlflow_uri)
    assert find_version("models:/liveedit@production", mlflow_uri).version == 2


def test_the_commands_list_show_promote_and_take_back(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    second = changed(tiny_model, tmp_path / "second")
    register(mlflow_uri, tiny_model, "production")
    register(mlflow_uri, second, "candidate")
    uri = ["--uri", mlflow_uri]

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, ["models", *arguments, *uri])
        assert result.exit_code == 0, result.output
        return result.output

    lines = said("list").splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["2", "candidate"], ["1", "production"]]
    assert "liveedit@production is version 2" in said("promote", "models:/liveedit@candidate")
    assert said("list").splitlines()[1].split()[:3] == ["2", "candidate,", "production"]
    assert "liveedit@production is version 1" in said("rollback")
    said("promote", "models:/liveedit@candidate", "--share", "0.25")  # a canary
    served = "models:/liveedit@production"
    assert pointed(served, mlflow_uri) == Pointed("2", 0.25, "1")
    said("promote", "models:/liveedit@candidate")  # and all
    assert pointed(served, mlflow_uri) == Pointed("2", 1.0, "1")
    said("promote", "models:/liveedit@candidate", "--share", "0.5")
    said("rollback")
    assert pointed(served, mlflow_uri).version == "1"
    assert pointed(served, mlflow_uri).share == 1
    (second / "note").write_text("x")
    card = json.loads((second / "card.json").read_text())
    (second / "card.json").write_text(json.dumps(card | {"trained_at": ["64x32", "224x128"]}))
    assert "CHANGED since it was registered" in said("list").splitlines()[1]
    shown = said("show", "models:/liveedit/2")
    assert f"{second} (CHANGED since it was registered)" in shown
    assert "metric.gain" in shown
    assert "64x32, 224x128" in shown
    assert "as registered" in said("show", "models:/liveedit@production")


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
