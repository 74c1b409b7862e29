"""The model registry: which model directory is `candidate`, which is `production`.

Weights stay where training wrote them: MLflow gets an external model that names the place, so
nothing of many gigabytes is uploaded. The version points back at its pipeline run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tracking.records import Records
from pipelines.tracking.tracker import DEFAULT_FOLDER, ROOT, client_for, naming, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCATION = "liveedit.location"  # tag on a version: the model directory
DEMO_OUTPUT = DEFAULT_FOLDER / "demo"
SHIPPED = ROOT / "pipelines" / "start" / "demo"
FINGERPRINT = (
    "liveedit.fingerprint"  # tag on a version: what `pipelines.tracking.records` says of it
)


class RegistryError(ValueError):
    """A model name, version or alias that the registry does not have, or cannot be reached."""


def register(
    uri: str,
    name: str,
    location: Path,
    *,
    run_id: str,
    fingerprint: str,
    metrics: dict[str, float],
    aliases: tuple[str, ...],
) -> str:
    """Register the model directory at `location` as a new version of `name`; returns the version.

    A version that already holds this fingerprint at this place is given the aliases instead.
    """
    from mlflow.exceptions import MlflowException

    client = client_for(uri)
    with naming(uri):
        try:
            client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            client.create_registered_model(name, description="LiveEdit model directories")
        version = _existing(client, name, location, fingerprint)
        if version is None:
            version = _create(client, name, location, run_id, fingerprint, metrics)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, version)
    return version


def holds(uri: str, name: str, version: str, location: Path) -> bool:
    """Whether the registry has this version, pointing at `location`."""
    from mlflow.exceptions import MlflowException

    try:
        found = client_for(uri).get_model_version(name, version)
    except MlflowException:
        return False
    return found.tags.get(LOCATION) == str(location)


def locate(model: str | None) -> Path:
    """The model directory a user means: a path, `models:/NAME@ALIAS`, or null for the demo's model.

    Null is the model that the last pipeline in runs/demo finished, else the one shipped with this
    tree. Raises RegistryError.
    """
    if model is None:
        record = Records(DEMO_OUTPUT).read("register")
        if record and (Path(record.output) / "config.json").is_file():
            return Path(record.output)
        if (SHIPPED / "config.json").is_file():
            return SHIPPED
        raise RegistryError(
            "there is no model yet: run `liveedit demo` to train one, or name a model directory "
            "or models:/liveedit@production"
        )
    if model.startswith("models:/"):
        return resolve(model, resolve_uri(None))
    if not (Path(model) / "config.json").is_file():
        raise RegistryError(
            f"{model} is no model directory (config.json is missing); give a folder that training "
            "or `liveedit import` wrote, or models:/liveedit@production"
        )
    return Path(model)


def resolve(reference: str, uri: str) -> Path:
    """The model directory behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises RegistryError when the name, alias or version is unknown, or the directory is not here.
    """
    from mlflow.exceptions import MlflowException

    target = reference.removeprefix("models:/")
    name, _, alias = target.partition("@")
    name, _, number = name.partition("/")
    if not name or bool(alias) == bool(number):
        raise RegistryError(
            f"{reference!r} is no model reference; write models:/liveedit@production "
            "or models:/liveedit/3"
        )
    client = client_for(uri)
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(name, number)
    except MlflowException as error:
        known = [model.name for model in client.search_registered_models()]
        raise RegistryError(
            f"{reference} is not in the registry at {uri}, which holds "
            f"{', '.join(known) or 'nothing'}; train a model first, or set MLFLOW_TRACKING_URI to "
            "the registry that has it"
        ) from error
    location = Path(version.tags.get(LOCATION, ""))
    if not (location / "config.json").is_file():
        raise RegistryError(
            f"{reference} is version {version.version}, whose files lie at "
            f"{version.tags.get(LOCATION, 'a place it does not name')}, which cannot be read here; "
            "mount that folder, or give the path of a model directory"
        )
    return location


def _existing(client: MlflowClient, name: str, location: Path, fingerprint: str) -> str | None:
    for version in client.search_model_versions(f"name = '{name}'"):
        tags = client.get_model_version(name, version.version).tags
        if tags.get(LOCATION) == str(location) and tags.get(FINGERPRINT) == fingerprint:
            return str(version.version)
    return None


def _create(
    client: MlflowClient,
    name: str,
    location: Path,
    run_id: str,
    fingerprint: str,
    metrics: dict[str, float],
) -> str:
    import mlflow

    tags = {LOCATION: str(location), FINGERPRINT: fingerprint}
    mlflow.set_tracking_uri(client.tracking_uri)  # the external-model call has no client form
    # In the run's experiment: the default one would put MLflow's note of the model, and the folder
    # for it, wherever this process was started.
    experiment = client.get_run(run_id).info.experiment_id
    model = mlflow.create_external_model(
        name=name, source_run_id=run_id, tags=tags, experiment_id=experiment
    )
    numbers = {f"metric.{key}": f"{value:.4g}" for key, value in metrics.items()}
    version = client.create_model_version(
        name,
        source=f"models:/{model.model_id}",
        run_id=run_id,
        model_id=model.model_id,
        tags=tags | numbers,
    )
    return str(version.version)
