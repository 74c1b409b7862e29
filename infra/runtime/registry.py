"""The model registry, as whoever trains and whoever serves both read it: which folder is meant.

MLflow is imported when it is first asked; that takes seconds.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.runtime.environment import set_default, variable
from infra.runtime.errors import UserError
from infra.runtime.paths import RUNS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as ModelVersion

SCHEME = "models:/"
LOCATION = "liveedit.location"  # tag on a version: the model directory
FINGERPRINT = "liveedit.fingerprint"  # and what is in it
BEFORE = "liveedit.before."  # and an alias, tag on a model: the versions that had it, latest last
SHARE = "liveedit.share."  # and an alias, tag on a model: of new sessions, for its version


class RegistryError(UserError):
    """A model name, version or alias that the registry does not have, or cannot be reached."""


@dataclass(frozen=True)
class Registered:
    """A version's model directory, which is here; `fingerprint` is the one it was registered with,
    "" for none."""

    name: str  # for people: "liveedit version 3"
    location: Path
    fingerprint: str


@dataclass(frozen=True)
class Pointed:
    """An alias: its version, the `share` of new sessions that this is to get (1 unless a canary was
    asked for) and the version `before`, which has the rest; "" where nobody wrote that down."""

    version: str
    share: float = 1.0
    before: str = ""


def resolve_uri(uri: str | None) -> str:
    """The MLflow in use: the given one, MLFLOW_TRACKING_URI, or runs/mlflow.db here."""
    uri = uri or variable("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{(RUNS / 'mlflow.db').absolute()}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def client_for(uri: str) -> MlflowClient:
    """An MLflow client for `uri`, without telemetry and without a log of database migrations."""
    set_default("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def find_version(reference: str, uri: str) -> ModelVersion:
    """What the registry says of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises RegistryError.
    """
    from mlflow.exceptions import MlflowException

    target = reference.removeprefix(SCHEME)
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
        raise unknown(reference, uri) from error


def pointed(reference: str, uri: str) -> Pointed:
    """What `models:/NAME@ALIAS` stands for now, in one question. Raises RegistryError."""
    from mlflow.exceptions import MlflowException

    name, _, alias = reference.removeprefix(SCHEME).partition("@")
    try:
        model = client_for(uri).get_registered_model(name)
    except (MlflowException, OSError) as error:
        raise RegistryError(f"the registry at {uri} has no answer for {name}: {error}") from error
    version = model.aliases.get(alias)
    if version is None:
        raise RegistryError(f"{reference} is no longer in the registry at {uri}")
    before = [v for v in model.tags.get(BEFORE + alias, "").split(",") if v and v != str(version)]
    told = model.tags.get(SHARE + alias, "1")
    try:
        share = float(told)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise RegistryError(
            f"{name} has the tag {SHARE}{alias}={told!r}; a share of new sessions is from 0 to 1"
        )
    return Pointed(str(version), share, before[-1] if before else "")


def located(reference: str, version: ModelVersion) -> Registered:
    """Where the files of `version` lie, which `reference` named. Raises RegistryError if not here.

    What is in them is for the caller to compare with the fingerprint.
    """
    place = version.tags.get(LOCATION, "")
    if not (Path(place) / "config.json").is_file():
        raise RegistryError(
            f"{reference} is version {version.version}, whose files lie at "
            f"{place or 'a place it does not name'}, which cannot be read here; "
            "mount that folder, or give the path of a model directory"
        )
    fingerprint = version.tags.get(FINGERPRINT, "")
    return Registered(f"{version.name} version {version.version}", Path(place), fingerprint)


def unknown(what: str, uri: str) -> RegistryError:
    """The error for a name or reference that `uri` does not have; it says what there is."""
    from mlflow.exceptions import MlflowException

    try:
        known = [model.name for model in client_for(uri).search_registered_models()]
    except (MlflowException, OSError) as error:
        return RegistryError(
            f"the registry at {uri} does not answer ({error}), so {what} cannot be looked up; "
            "start it, or set MLFLOW_TRACKING_URI to the registry that has it"
        )
    return RegistryError(
        f"{what} is not in the registry at {uri}, which holds {', '.join(known) or 'nothing'}; "
        "train a model first, or set MLFLOW_TRACKING_URI to the registry that has it"
    )
