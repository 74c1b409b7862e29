"""What a reference stands for, whether its files are still those, and how an alias goes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from infra.runtime.registry import (
    Pointed,
    RegistryError,
    find_version,
    pointed,
)
from modeling.fingerprint import FingerprintError
from pipelines import cli
from pipelines.tracking import registry
from pipelines.tracking.records import Records, StageRecord
from serve.versions.source import find_model
from tests.pipelines.tracking.registered import changed, register


@pytest.fixture(scope="module")
def candidate(_migrated: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a registry with one version, that nobody changes."""
    database = tmp_path_factory.mktemp("candidate") / "mlflow.db"
    shutil.copy(_migrated, database)
    register(f"sqlite:///{database}", tiny_model, "candidate")
    return f"sqlite:///{database}"


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
def test_unknown_references(candidate: str, reference: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.resolve(reference, candidate)


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
    with pytest.raises(FingerprintError, match="version 2 is not what was registered"):
        registry.promote("models:/liveedit/2", "production", mlflow_uri)
    assert pointed(served, mlflow_uri).version == "1"
    assert "64x32, 224x128" in shown
    assert "as registered" in said("show", "models:/liveedit@production")
