"""The model registry: which version is `candidate`, which is `production`, and which were before.

A version is for ever: its files lie in a folder of their own (`pipelines.tracking.versions`), whose
fingerprint is in the registry and is compared whenever a version is looked up. MLflow gets an
external model that names the place, so nothing of many gigabytes is uploaded. The version points
back at its pipeline run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from infra.runtime.environment import environment
from infra.runtime.paths import ROOT
from modeling.fingerprint import check_fingerprint
from pipelines.tracking.records import Records
from pipelines.tracking.tracker import CHECK_ENV, DEFAULT_FOLDER, client_for, naming, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

LOCATION = "liveedit.location"  # tag on a version: the model directory
DEMO_OUTPUT = DEFAULT_FOLDER / "demo"
SHIPPED = ROOT / "pipelines" / "start" / "demo"
FINGERPRINT = "liveedit.fingerprint"  # tag on a version: of its model directory
BEFORE = "liveedit.before."  # and an alias, tag on a model: the versions that had it, latest last


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
    `location` must stay as it is for as long as the version: see `pipelines.tracking.versions`.
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
            _point(client, name, alias, version)
    return version


def holds(uri: str, name: str, version: str, location: Path) -> bool:
    """Whether the registry has this version, pointing at `location`; also if it does not answer
    within seconds, because then nothing says that it has not."""
    from mlflow.exceptions import MlflowException

    try:
        with environment(CHECK_ENV):
            found = client_for(uri).get_model_version(name, version)
    except MlflowException as error:
        return error.error_code != "RESOURCE_DOES_NOT_EXIST"
    return found.tags.get(LOCATION) == str(location)


def promote(reference: str, alias: str, uri: str) -> ModelVersion:
    """Give `alias` to the version that `reference` names, if its files are what was registered."""
    version = find_version(reference, uri)
    location_of(reference, version)
    with naming(uri):
        _point(client_for(uri), version.name, alias, str(version.version))
    return version


def rollback(name: str, alias: str, uri: str) -> ModelVersion:
    """Give `alias` back to the version that had it before; returns that version.

    Raises RegistryError where there is none, or its files are not what was registered.
    """
    client = client_for(uri)
    now = find_version(f"models:/{name}@{alias}", uri)
    before = _before(client, name, alias)
    while before and before[-1] == str(now.version):  # an earlier rollback was cut short
        del before[-1]
    if not before:
        raise RegistryError(
            f"{name}@{alias} is version {now.version} and was no other before; `liveedit models "
            f"list {name}` shows all, `liveedit models promote models:/{name}/N` takes one"
        )
    version = find_version(f"models:/{name}/{before[-1]}", uri)
    location_of(f"models:/{name}/{version.version}", version)
    with naming(uri):
        client.set_registered_model_alias(name, alias, before[-1])
        client.set_registered_model_tag(name, BEFORE + alias, ",".join(before[:-1]))
    return version


def versions(name: str, uri: str) -> list[ModelVersion]:
    """All versions of `name`, newest first, with their aliases. Raises RegistryError."""
    client = client_for(uri)
    with naming(uri):
        numbers = [found.version for found in client.search_model_versions(f"name = '{name}'")]
    if not numbers:
        raise _unknown(name, uri)
    numbers.sort(key=int, reverse=True)
    return [find_version(f"models:/{name}/{number}", uri) for number in numbers]


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

    Raises RegistryError when the name, alias or version is unknown, or the directory is not here,
    and FingerprintError when it is not what was registered.
    """
    return location_of(reference, find_version(reference, uri))


def find_version(reference: str, uri: str) -> ModelVersion:
    """What the registry says of `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
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
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, number)
    except MlflowException as error:
        raise _unknown(reference, uri) from error


def location_of(reference: str, version: ModelVersion) -> Path:
    """The folder of `version`, which `reference` named, after a look at what is in it."""
    location = Path(version.tags.get(LOCATION, ""))
    if not (location / "config.json").is_file():
        raise RegistryError(
            f"{reference} is version {version.version}, whose files lie at "
            f"{version.tags.get(LOCATION, 'a place it does not name')}, which cannot be read here; "
            "mount that folder, or give the path of a model directory"
        )
    name = f"{version.name} version {version.version}"
    check_fingerprint(name, location, version.tags.get(FINGERPRINT, ""))
    return location


def _unknown(reference: str, uri: str) -> RegistryError:
    with naming(uri):
        known = [model.name for model in client_for(uri).search_registered_models()]
    return RegistryError(
        f"{reference} is not in the registry at {uri}, which holds "
        f"{', '.join(known) or 'nothing'}; train a model first, or set MLFLOW_TRACKING_URI to "
        "the registry that has it"
    )


def _point(client: MlflowClient, name: str, alias: str, version: str) -> None:
    """Give `alias` to `version`, and remember which version had it."""
    had = client.get_registered_model(name).aliases.get(alias)
    if had is not None and str(had) != version:
        before = ",".join([*_before(client, name, alias), str(had)])
        client.set_registered_model_tag(name, BEFORE + alias, before)
    client.set_registered_model_alias(name, alias, version)


def _before(client: MlflowClient, name: str, alias: str) -> list[str]:
    tags = client.get_registered_model(name).tags
    return [number for number in tags.get(BEFORE + alias, "").split(",") if number]


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
