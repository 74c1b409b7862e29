"""Which model directory a server loads, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from modeling.fingerprint import check_fingerprint
from modeling.model_dir import read_config
from modeling.presets import PRESETS

LOCATION = "liveedit.location"  # tag of a registered version: where its model directory lies
FINGERPRINT = "liveedit.fingerprint"  # and what is in it


@dataclass(frozen=True)
class ModelSource:
    """`directory` is a path or a preset; `name` and `fingerprint` are the registered version's,
    None for what has none."""

    directory: str
    name: str | None = None
    fingerprint: str | None = None

    def check(self) -> None:
        """Raise a FingerprintError if a registered version's files are no longer what they were;
        before every load, because replicas start long after the version was looked up."""
        if self.name is not None:
            check_fingerprint(self.name, self.directory, self.fingerprint or "")


def find_model(model: str) -> ModelSource:
    """`model` itself, or the directory behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    The registry is the one that MLFLOW_TRACKING_URI names. Raises ValueError with the remedy, also
    for a directory whose weights an editor could not load, as far as file headers show.
    """
    found = _registered(model) if model.startswith("models:/") else ModelSource(model)
    if found.directory not in PRESETS:
        _check(Path(found.directory))
    found.check()
    return found


def _check(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is no model directory here: it has no config.json")
    read_config(directory)
    for part in ("transformer", "vae"):
        file = directory / f"{part}.safetensors"
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}); serving needs transformer and VAE: export or "
                "import the model again"
            ) from error


def _registered(model: str) -> ModelSource:
    import mlflow

    client = mlflow.MlflowClient()
    name, _, alias = model.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(name, number)
    except mlflow.exceptions.MlflowException as error:
        raise ValueError(
            f"{model} is not in the registry at {mlflow.get_tracking_uri()}: {error}; set "
            "MLFLOW_TRACKING_URI to the registry that has it"
        ) from error
    location = version.tags.get(LOCATION, "")
    if not (Path(location) / "config.json").is_file():
        raise ValueError(
            f"{model} is version {version.version} at {location or 'no place'}, which this "
            "machine cannot read; mount that folder where editors run"
        )
    fingerprint = version.tags.get(FINGERPRINT, "")
    return ModelSource(location, f"{name} version {version.version}", fingerprint)
