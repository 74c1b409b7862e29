"""Which model directory a server loads, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from infra.runtime.errors import UserError
from infra.runtime.registry import SCHEME, find_version, located, resolve_uri
from modeling.fingerprint import check_fingerprint
from modeling.model_dir import read_config
from modeling.presets import PRESETS


@dataclass(frozen=True)
class ModelSource:
    """`directory` is a path or a preset; `name` and `fingerprint` are the registered version's,
    None for what has none."""

    directory: str
    name: str | None = None
    fingerprint: str | None = None

    @property
    def trained(self) -> tuple[int, int]:
        """Height and width that it was trained at."""
        known = self.directory in PRESETS
        stream = (PRESETS[self.directory] if known else read_config(self.directory)).stream
        return stream.height, stream.width

    def check(self) -> None:
        """Raise a FingerprintError if a registered version's files are no longer what they were;
        before every load, because replicas start long after the version was looked up."""
        if self.name is not None:
            check_fingerprint(self.name, self.directory, self.fingerprint or "")


def find_model(model: str, registry: str | None = None) -> ModelSource:
    """`model` itself, or the directory behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    `registry` is MLflow's address, see `resolve_uri`. Raises UserError with the remedy, also
    for a directory whose weights an editor could not load, as far as file headers show.
    """
    found = ModelSource(model)
    if model.startswith(SCHEME):
        version = located(model, find_version(model, resolve_uri(registry)))
        found = ModelSource(str(version.location), version.name, version.fingerprint)
    if found.directory not in PRESETS:
        _check(Path(found.directory))
    found.check()
    return found


def _check(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is no model directory here: it has no config.json")
    read_config(directory)
    for part in ("transformer", "vae"):
        file = directory / f"{part}.safetensors"
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} cannot be read ({error}); serving needs transformer and VAE: export or "
                "import the model again"
            ) from error
