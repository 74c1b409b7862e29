"""The model registry: which version is `candidate`, which is `production`, and which were before.

A version is for ever: its files lie in a folder of their own (`pipelines.stages.register`), whose
fingerprint is in the registry and is compared whenever a version is looked up. MLflow gets an
external model that names the place, so nothing of many gigabytes is uploaded. The version points
back at its pipeline run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.runtime.environment import environment
from infra.runtime.paths import ROOT, RUNS
from infra.runtime.registry import (
    BEFORE,
    FINGERPRINT,
    LOCATION,
    SCHEME,
    SHARE,
    RegistryError,
    client_for,
    find_version,
    located,
    resolve_uri,
    unknown,
)
from modeling.fingerprint import check_fingerprint
from pipelines.tracking.describe import description
from pipelines.tracking.lineage import find_model, make_model
from pipelines.tracking.preview import preview
from pipelines.tracking.records import Records
from pipelines.tracking.tracker import CHECK_ENV, NOTE, naming

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DEMO_OUTPUT = RUNS / "demo"
SHIPPED = ROOT / "pipelines" / "start" / "natural"
AS_ASKED = "as asked"


def register(
    uri: str,
    name: str,
    location: Path,
    *,
    run_id: str,
    fingerprint: str,
    metrics: dict[str, float],
    aliases: tuple[str, ...],
    judged_on: tuple[str, str] | None = None,
    shown: Sequence[Path] = (),
) -> str:
    """Register the model directory at `location` as a new version of `name`; returns the version.

    `judged_on` is name and digest of the dataset that gave `metrics`, as an input of the run has
    them; `shown` are small pictures and videos, which its page shows. A version that already holds
    this fingerprint at this place is given the aliases instead. `location` must stay as it is for
    as long as the version: see `pipelines.stages.register.publish`.
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
            version, model_id = _create(client, name, location, run_id, fingerprint, metrics)
            reference = f"models:/{name}/{version}"
            text = _attach(client, model_id, reference, location, metrics, shown)
            client.update_model_version(name, version, text)
            _illustrate(client, model_id, run_id, metrics, judged_on)
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


def promote(reference: str, alias: str, uri: str, share: float = 1.0) -> ModelVersion:
    """Give `alias` to the version that `reference` names, if its files are what was registered.

    Below 1 that is a canary: where the alias is served the version gets this `share` of new
    sessions, and the one before it the rest.
    """
    version = find_version(reference, uri)
    check_files(reference, version)
    client = client_for(uri)
    with naming(uri):
        if share < 1:  # first, or a server could see the alias without it
            client.set_registered_model_tag(version.name, SHARE + alias, f"{share:g}")
        _point(client, version.name, alias, str(version.version))
        if share >= 1:
            _all(client, version.name, alias)
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
    check_files(f"models:/{name}/{version.version}", version)
    with naming(uri):
        client.set_registered_model_alias(name, alias, before[-1])
        client.set_registered_model_tag(name, BEFORE + alias, ",".join(before[:-1]))
        _all(client, name, alias)
    return version


def versions(name: str, uri: str) -> list[ModelVersion]:
    """All versions of `name`, newest first, with their aliases. Raises RegistryError."""
    client = client_for(uri)
    with naming(uri):
        numbers = [found.version for found in client.search_model_versions(f"name = '{name}'")]
    if not numbers:
        raise unknown(name, uri)
    numbers.sort(key=int, reverse=True)
    return [find_version(f"models:/{name}/{number}", uri) for number in numbers]


@dataclass(frozen=True)
class Chosen:
    """A model directory, absolute, and why it was taken."""

    path: Path
    why: str


def locate(model: str | None) -> Path:
    """The model directory a user means: see `choose`."""
    return choose(model).path


def choose(model: str | None) -> Chosen:
    """A path (what ships is found from anywhere), `models:/NAME@ALIAS`, or null for the model at
    hand.

    Null is the model that the last pipeline in runs/demo of the working directory finished, else
    that in runs/demo of this tree, else the one shipped with it. Raises RegistryError.
    """
    if model is None:
        # Absolute, because what runs in other processes has other working directories.
        for folder in (DEMO_OUTPUT.absolute(), ROOT / DEMO_OUTPUT):
            record = Records(folder).read("register")
            if record and (Path(record.output) / "config.json").is_file():
                return Chosen(Path(record.output), f"made by the last demo in {folder}")
        if (SHIPPED / "config.json").is_file():
            return Chosen(SHIPPED, "the model that ships: no `liveedit demo` has finished")
        raise RegistryError(
            "there is no model yet: run `liveedit demo` to train one, or name a model directory "
            "or models:/liveedit@production"
        )
    if model.startswith(SCHEME):
        return Chosen(resolve(model, resolve_uri(None)), "as the registry says")
    shipped = ROOT / model
    if not Path(model).exists() and shipped.parent == SHIPPED.parent and shipped.is_dir():
        return Chosen(shipped, "which ships")
    if not (Path(model) / "config.json").is_file():
        raise RegistryError(
            f"{model or repr(model)} is no model directory (config.json is missing); give a folder "
            "that training or `liveedit import` wrote, or models:/liveedit@production, or none for "
            "the model at hand"
        )
    return Chosen(Path(model).absolute(), AS_ASKED)


def resolve(reference: str, uri: str) -> Path:
    """The model directory behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises RegistryError when the name, alias or version is unknown, or the directory is not here,
    and FingerprintError when it is not what was registered.
    """
    return check_files(reference, find_version(reference, uri))


def check_files(reference: str, version: ModelVersion) -> Path:
    """The folder of `version`, which `reference` named, after a look at what is in it."""
    found = located(reference, version)
    check_fingerprint(found.name, found.location, found.fingerprint)
    return found.location


def _point(client: MlflowClient, name: str, alias: str, version: str) -> None:
    """Give `alias` to `version`, and remember which version had it."""
    had = client.get_registered_model(name).aliases.get(alias)
    if had is not None and str(had) != version:
        before = ",".join([*_before(client, name, alias), str(had)])
        client.set_registered_model_tag(name, BEFORE + alias, before)
    client.set_registered_model_alias(name, alias, version)


def _all(client: MlflowClient, name: str, alias: str) -> None:
    """No canary: all new sessions are for the alias's version."""
    if SHARE + alias in client.get_registered_model(name).tags:
        client.delete_registered_model_tag(name, SHARE + alias)


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
) -> tuple[str, str]:
    """The version's number, and the id of the logged model behind it: that of the run which made
    these files, if it told so."""
    import mlflow

    tags = {LOCATION: str(location), FINGERPRINT: fingerprint}
    experiment = client.get_run(run_id).info.experiment_id
    model = find_model(client, experiment, fingerprint)
    if model is None:
        model = make_model(client, experiment, name, location, fingerprint, run_id)
    else:
        client.set_logged_model_tags(model, tags)  # where its files stay
    numbers = {f"metric.{key}": f"{value:.4g}" for key, value in metrics.items()}
    # A database looks the source up where the process says; MLflow would tell that to all children.
    with environment({"MLFLOW_TRACKING_URI": client.tracking_uri}):
        mlflow.set_tracking_uri(client.tracking_uri)
    version = client.create_model_version(
        name,
        source=f"models:/{model}",
        run_id=run_id,
        model_id=model,
        tags=tags | numbers,
        await_creation_for=0,  # it is there already; over HTTP, MLflow would say that it waits
    )
    _link_back(client, model, name, str(version.version))
    return str(version.version), model


def _link_back(client: MlflowClient, model_id: str, name: str, version: str) -> None:
    """The model's page says of which versions it is; MLflow's own `register_model` does the same.

    A version's other fields say whose model it is, but the page reads this alone.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    told = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    told.append({"name": name, "version": version})
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(told)})


def _illustrate(
    client: MlflowClient,
    model_id: str,
    run_id: str,
    metrics: dict[str, float],
    judged_on: tuple[str, str] | None,
) -> None:
    """What a person sees of numbers on the model's page."""
    dataset, digest = judged_on or (None, None)
    for key, value in metrics.items():
        client.log_metric(
            run_id, key, value, dataset_name=dataset, dataset_digest=digest, model_id=model_id
        )


def _attach(
    client: MlflowClient,
    model_id: str,
    reference: str,
    location: Path,
    metrics: Mapping[str, float],
    shown: Sequence[Path],
) -> str:
    """Copies of small files, among the model's artifacts; the page that shows them."""
    with tempfile.TemporaryDirectory(prefix="liveedit-") as folder:
        names = [(path.name, preview(path, Path(folder)).name) for path in shown]
        for file in (location / "card.json", *shown):
            shutil.copyfile(file, Path(folder) / file.name)
        client.log_model_artifacts(model_id, folder)
    made_by = client.get_logged_model(model_id).tags
    text = description(reference, location, metrics, model_id, names, made_by)
    client.set_logged_model_tags(model_id, {NOTE: text})
    return text
