"""Which model directory a server loads."""

from __future__ import annotations

from pathlib import Path

from modeling.presets import PRESETS

LOCATION = "liveedit.location"  # tag of a registered version: where its model directory lies


def model_directory(model: str) -> str:
    """`model` itself, or the directory behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    The registry is the one that MLFLOW_TRACKING_URI names. Raises ValueError with the remedy.
    """
    if not model.startswith("models:/"):
        if model not in PRESETS and not (Path(model) / "config.json").is_file():
            raise ValueError(f"{model} is no model directory here: it has no config.json")
        return model
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
    return location
