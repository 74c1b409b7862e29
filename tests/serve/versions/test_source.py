"""Which directory a server loads: what is wrong is said before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modeling.fingerprint import FingerprintError, model_fingerprint
from serve.app import build
from serve.settings import ServeSettings
from serve.versions.rolling import Version
from serve.versions.source import ModelSource, Named, find_model, find_models
from tests.known_editors import TURNED, write_known_model
from tests.serve.registry import Registry


@pytest.fixture
def known(tmp_path: Path) -> Path:
    return write_known_model(tmp_path / "known")


def test_people_are_not_told_where_a_model_lies() -> None:
    made = [ModelSource("/srv/secret/natural"), ModelSource("/srv/secret/1", "liveedit version 3")]
    assert [source.label for source in made] == ["natural", "liveedit version 3"]
    assert [source.key for source in made] == ["/srv/secret/natural", "liveedit version 3"]


def test_what_is_said_of_a_model_that_no_editor_has(known: Path) -> None:
    """As an editor would say it, but for what only that knows."""
    assert ModelSource(str(known), "liveedit version 3").describe() == {
        "name": "liveedit version 3", "width": 96, "height": 64, "fps": 16.0, "chunk_frames": 12,
        "first_chunk_frames": 9, "steps": 4, "device": "", "chunk_seconds": 0.0,
        "frame_seconds": 0.0, "card": {"name": "known"},
    }  # fmt: skip


def test_a_versions_size_is_that_of_all_its_weights(known: Path) -> None:
    """The text encoder's, in a folder of its own, too; and its sizes are height and width."""
    source = ModelSource(str(known))
    before = source.version()
    assert before == Version(str(known), (64, 96), before.size)
    (known / "text" / "part.safetensors").parent.mkdir(exist_ok=True)
    (known / "text" / "part.safetensors").write_bytes(bytes(1000))
    (known / "text" / "words.txt").write_bytes(bytes(77))
    assert source.version().size == before.size + 1000
    assert before.size > 1000


def test_a_preset_and_a_directory_are_themselves(known: Path) -> None:
    assert find_model("demo") == ModelSource("demo")
    assert find_model(str(known)) == ModelSource(str(known), None)


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("how", ["absent", "cut", "empty"])
def test_weights_that_an_editor_could_not_load_are_named(known: Path, part: str, how: str) -> None:
    file = known / f"{part}.safetensors"
    if how == "absent":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 1000 if how == "cut" else 0])
    with pytest.raises(ValueError, match=f"{part}.safetensors cannot be read"):
        find_model(str(known))


def test_a_directory_without_a_config_is_none(known: Path, tmp_path: Path) -> None:
    (known / "config.json").unlink()
    for directory in (known, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"{directory} is no model directory here"):
            find_model(str(directory))


def test_a_config_that_is_wrong_is_named(known: Path) -> None:
    config = json.loads((known / "config.json").read_text())
    (known / "config.json").write_text(json.dumps(config | {"colour": 1}))
    with pytest.raises(ValueError, match="colour"):
        find_model(str(known))


def test_a_reference_is_the_version_that_it_names(
    registry: Registry, known: Path, tmp_path: Path
) -> None:
    other = write_known_model(tmp_path / "other")
    registry.register("editor", "production", known)
    registry.register("editor", "candidate", other)
    first = ModelSource(str(known), "editor version 1", model_fingerprint(known))
    second = ModelSource(str(other), "editor version 2", model_fingerprint(other))
    for reference, wanted in (
        ("models:/editor@production", first),
        ("models:/editor/1", first),
        ("models:/editor@candidate", second),
        ("models:/editor/2", second),
    ):
        assert find_model(reference, registry.uri) == wanted
    # The application has it once, so that all its replicas have the same version.
    chosen = ServeSettings("models:/editor@candidate")
    front = build(chosen, registry.uri)._bound_deployment
    settings, serves, editor = front.init_args
    reference = "models:/editor@candidate"
    told = second.describe()
    assert serves == (
        Named("editor@candidate", reference, second, second.version(), told, registry.uri),
    )
    assert editor._bound_deployment.init_args == (chosen, serves) == (settings, serves)
    for wrong in ("models:/editor@nobody", "models:/editor/9", "models:/absent@production"):
        with pytest.raises(ValueError, match="is not in the registry at sqlite"):
            find_model(wrong, registry.uri)


def test_an_alias_is_followed_where_it_was_found(
    registry: Registry, known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the environment said so: the hub asks there from another process. What never
    moves is not asked for."""
    registry.register("kept", "production", known)
    references = ("models:/kept@production", "models:/kept/1", str(known), "demo")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    for said in (None, registry.uri):
        found = find_models(references, said)
        assert [(each.name, each.registry) for each in found] == [
            ("kept@production", registry.uri), ("kept/1", ""), ("known", ""), ("demo", ""),
        ]  # fmt: skip
        assert [each.reference for each in found] == list(references)


def test_a_version_whose_files_have_changed_since_is_refused_at_once(
    registry: Registry, known: Path, tmp_path: Path
) -> None:
    """Weights of the same shapes, which could be loaded."""
    registry.register("changed", "production", known)
    other = write_known_model(tmp_path / "other", paints=TURNED)
    (known / "transformer.safetensors").write_bytes(
        (other / "transformer.safetensors").read_bytes()
    )
    with pytest.raises(FingerprintError, match="changed version 1 is not what was registered"):
        find_model("models:/changed@production", registry.uri)


@pytest.mark.parametrize("located", [True, False])
def test_a_version_that_lies_nowhere_here_is_named(
    registry: Registry, tmp_path: Path, located: bool
) -> None:
    place = tmp_path / "elsewhere" if located else None
    model = f"editor-{located}"
    registry.register(model, "production", place)
    named = str(place) if located else "a place it does not name"
    with pytest.raises(ValueError, match=f"files lie at {named}, which cannot be read here"):
        find_model(f"models:/{model}@production", registry.uri)


@pytest.mark.parametrize("fingerprint", [None, "", "0" * 64])
def test_a_version_is_its_fingerprint(known: Path, fingerprint: str | None) -> None:
    """One that tells none may be anything."""
    ModelSource(str(known), "editor version 1", model_fingerprint(known)).check()
    with pytest.raises(FingerprintError, match="editor version 1 is not what was registered"):
        ModelSource(str(known), "editor version 1", fingerprint).check()
    ModelSource(str(known)).check()


def test_strangers_are_shown_nothing_of_a_card_but_what_clients_want(known: Path) -> None:
    """It names paths and people's data."""
    card = {"name": "ours", "prompts": ["red"], "dataset": "s3://secret/train", "start": "/home/x"}
    (known / "card.json").write_text(json.dumps(card))
    told = ModelSource(str(known)).describe()
    assert told["card"] == {"name": "ours", "prompts": ["red"]}
    assert told["name"] == "ours"
