"""An MLflow registry of its own, in a file."""

from __future__ import annotations

from pathlib import Path

from infra.runtime.registry import FINGERPRINT, LOCATION, client_for
from modeling.fingerprint import model_fingerprint


class Registry:
    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = client_for(self.uri)

    def register(self, model: str, alias: str | None, location: Path | None) -> str:
        """A new version with its files at `location`, and the alias; returns its number."""
        if not self.client.search_registered_models(f"name='{model}'"):
            self.client.create_registered_model(model)
        tags = {} if location is None else {LOCATION: str(location)}
        if location is not None and location.exists():
            tags[FINGERPRINT] = model_fingerprint(location)
        version = self.client.create_model_version(model, "file:///absent", tags=tags)
        if alias is not None:
            self.client.set_registered_model_alias(model, alias, version.version)
        return str(version.version)
