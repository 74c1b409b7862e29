from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.tracking import registry
from pipelines.tracking.records import Records, StageRecord
from pipelines.tracking.registry import RegistryError
from pipelines.tracking.tracker import Tracker, client_for


def register(uri: str, model: Path, fingerprint: str, *aliases: str) -> str:
    run = Tracker.start_pipeline(uri, "liveedit", "demo", {})
    return registry.register(
        uri,
        "liveedit",
        model,
        run_id=run.run_id,
        fingerprint=fingerprint,
        metrics={"gain": 4.5},
        aliases=aliases,
    )


def test_aliases_move_to_the_newest_and_lead_to_its_files(
    mlflow_uri: str, tiny_model: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    shutil.copytree(tiny_model, second)
    assert register(mlflow_uri, tiny_model, "a", "candidate", "production") == "1"
    assert register(mlflow_uri, second, "b", "candidate") == "2"
    assert registry.resolve("models:/liveedit@production", mlflow_uri) == tiny_model
    assert registry.resolve("models:/liveedit@candidate", mlflow_uri) == second
    assert registry.resolve("models:/liveedit/1", mlflow_uri) == tiny_model


def test_registering_leaves_nothing_where_it_was_started(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That folder may belong to somebody else, as in a container."""
    here, store = tmp_path / "here", tmp_path / "store"
    here.mkdir()
    store.mkdir()
    monkeypatch.chdir(here)
    # A database made from here on: its default experiment lies in this folder.
    register(f"sqlite:///{store / 'mlflow.db'}", tiny_model, "a")
    assert not list(here.iterdir())


def test_same_model_is_not_registered_twice(mlflow_uri: str, tiny_model: Path) -> None:
    assert register(mlflow_uri, tiny_model, "a", "candidate") == "1"
    assert register(mlflow_uri, tiny_model, "a", "production") == "1"
    assert registry.resolve("models:/liveedit@production", mlflow_uri) == tiny_model
    assert registry.holds(mlflow_uri, "liveedit", "1", tiny_model)
    assert not registry.holds(mlflow_uri, "liveedit", "2", tiny_model)


def test_version_points_back_at_its_run_and_uploads_nothing(
    mlflow_uri: str, tiny_model: Path
) -> None:
    register(mlflow_uri, tiny_model, "a")
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
    ],
)
def test_unknown_references(
    mlflow_uri: str, tiny_model: Path, reference: str, message: str
) -> None:
    register(mlflow_uri, tiny_model, "a", "candidate")
    with pytest.raises(RegistryError, match=message):
        registry.resolve(reference, mlflow_uri)


def test_files_that_are_gone_are_named(mlflow_uri: str, tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    register(mlflow_uri, copy, "a", "candidate")
    shutil.rmtree(copy)
    with pytest.raises(RegistryError, match=rf"files lie at {copy}, which cannot be read here"):
        registry.resolve("models:/liveedit@candidate", mlflow_uri)


def test_without_a_name_the_demo_s_model_is_meant(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(RegistryError, match="run `liveedit demo`"):
        registry.locate(None)
    shutil.copytree(tiny_model, tmp_path / "shipped")
    assert registry.locate(None) == tmp_path / "shipped"
    Records(Path("runs/demo")).write(StageRecord("register", "k", "f", str(tiny_model), "run"))
    assert registry.locate(None) == tiny_model
    with pytest.raises(RegistryError, match=r"elsewhere is no model directory"):
        registry.locate("elsewhere")
