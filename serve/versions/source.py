"""Which model directory a server loads, and what it is called.

`modeling.model_dir` is imported where files are read, for PyTorch's sake: without it a hub is there
again in a quarter of the time, in which nobody but its front knows of a session.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from infra.runtime.errors import UserError
from infra.runtime.registry import SCHEME, find_version, located, resolve_uri
from modeling.config import ModelConfig
from modeling.fingerprint import check_fingerprint
from modeling.presets import PRESETS
from serve.versions.catalog import Menu
from serve.versions.rolling import Offer, Version

if TYPE_CHECKING:
    from infra.runtime.registry import ModelVersion

SHOWN = ("name", "prompts", "words", "sample", "trained_at")  # what clients want of a card


@dataclass(frozen=True)
class ModelSource:
    """`directory` is a path or a preset; `name` and `fingerprint` are the registered version's,
    None for what has none."""

    directory: str
    name: str | None = None
    fingerprint: str | None = None

    @property
    def key(self) -> str:
        """Its name among all that an application serves."""
        return self.name or self.directory

    @property
    def label(self) -> str:
        """What people are told, who need not know where it lies."""
        return self.name or Path(self.directory).name

    @property
    def config(self) -> ModelConfig:
        from modeling.model_dir import read_config

        known = self.directory in PRESETS
        return PRESETS[self.directory] if known else read_config(self.directory)

    @property
    def card(self) -> dict[str, Any]:
        from modeling.model_dir import read_card

        return {} if self.directory in PRESETS else read_card(self.directory)

    @property
    def trained(self) -> tuple[int, int]:
        """Height and width that it was trained at."""
        stream = self.config.stream
        return stream.height, stream.width

    def version(self) -> Version:
        """What is known of it before it is loaded; reads its files."""
        from modeling.model_dir import latents_identity

        folder = Path(self.directory)
        weights = [file for file in folder.rglob("*.safetensors") if file.is_file()]
        lineage = ""
        if self.name is not None:
            lineage = latents_identity(folder, self.config)
        size = sum(file.stat().st_size for file in weights)
        return Version(self.key, self.trained, size, lineage)

    def describe(self) -> dict[str, Any]:
        """What `/v1/models` says of a model that no editor has: to strangers, so of the card, which
        names paths, only `SHOWN`."""
        return {
            **describe(self.config, self.name or str(self.card.get("name", self.label))),
            "device": "",
            "chunk_seconds": 0.0,
            "frame_seconds": 0.0,
            "card": shown(self.card),
        }

    def check(self) -> None:
        """Raise a FingerprintError if a registered version's files are no longer what they were;
        before every load, because replicas start long after the version was looked up."""
        if self.name is not None:
            check_fingerprint(self.name, self.directory, self.fingerprint or "")


def describe(config: ModelConfig, name: str) -> dict[str, Any]:
    """The part that needs no editor."""
    stream = config.stream
    return {
        "name": name,
        "width": stream.width,
        "height": stream.height,
        "fps": stream.fps,
        "chunk_frames": stream.chunk_frames,
        "first_chunk_frames": stream.first_chunk_frames,
        "steps": len(stream.timesteps),
    }


def shown(card: dict[str, Any]) -> dict[str, Any]:
    return {name: card[name] for name in SHOWN if name in card}


@dataclass(frozen=True)
class Named:
    """A model as clients choose it: by `name`. `reference` is the setting's own word for it, and
    `registry` MLflow's address where that is an alias, which may move. What its files say was read
    once, so that neither fronts nor the hub need them: `version`, and `told` as `describe` has it.
    """

    name: str
    reference: str
    source: ModelSource
    version: Version
    told: dict[str, Any]
    registry: str = ""


def find_models(references: Iterable[str], registry: str | None = None) -> tuple[Named, ...]:
    """Every reference looked up. Raises UserError as `find_model` does, and for two of one name."""
    found: dict[str, Named] = {}
    for reference in references:
        name = name_of(reference)
        if name in found:
            raise UserError(
                f"{found[name].reference} and {reference} would both be called {name}, by which "
                "clients choose; rename one of the folders, or leave one out"
            )
        follows = reference.startswith(SCHEME) and "@" in reference
        uri = resolve_uri(registry) if follows else ""
        source = find_model(reference, registry)
        found[name] = Named(name, reference, source, source.version(), source.describe(), uri)
    return tuple(found.values())


def menu_of(serves: Iterable[Named]) -> Menu:
    """What may be chosen when nothing has moved."""
    named = list(serves)
    offers = tuple(Offer(each.name, each.version.key) for each in named)
    return Menu(offers, {each.version.key: each.version for each in named})


def name_of(reference: str) -> str:
    """By which clients choose it: NAME@ALIAS, NAME/VERSION, a folder's name, a preset's."""
    if reference.startswith(SCHEME):
        return reference.removeprefix(SCHEME)
    return Path(reference).name


def find_model(model: str, registry: str | None = None) -> ModelSource:
    """`model` itself, or the directory behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    `registry` is MLflow's address, see `resolve_uri`. Raises UserError with the remedy, also
    for a directory whose weights an editor could not load, as far as file headers show.
    """
    if model.startswith(SCHEME):
        return source_of(model, find_version(model, resolve_uri(registry)))
    return _checked(ModelSource(model))


def source_of(reference: str, version: ModelVersion) -> ModelSource:
    """Where `version`, which `reference` named, lies. Raises UserError as `find_model` does."""
    found = located(reference, version)
    return _checked(ModelSource(str(found.location), found.name, found.fingerprint))


def _checked(source: ModelSource) -> ModelSource:
    if source.directory not in PRESETS:
        _check(Path(source.directory))
    source.check()
    return source


def _check(directory: Path) -> None:
    from modeling.model_dir import read_config

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
