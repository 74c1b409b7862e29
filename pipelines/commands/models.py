"""`liveedit models`: what the registry holds, who is production, and who was before."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from infra.runtime.registry import (
    FINGERPRINT,
    LOCATION,
    RegistryError,
    find_version,
    resolve_uri,
)
from pipelines.commands.show import console, examples

if TYPE_CHECKING:
    from infra.runtime.registry import ModelVersion

models_app = typer.Typer(
    no_args_is_help=True, help="List registered models; promote one, or take that back."
)
Uri = Annotated[
    str | None,
    typer.Option(help="MLflow's address (default: MLFLOW_TRACKING_URI, or runs/mlflow.db)."),
]
Alias = Annotated[str, typer.Option(help="The alias that moves.")]
Name = Annotated[str, typer.Argument(help="Name of a registered model.")]


@models_app.command("list", epilog=examples("liveedit models list"))
def list_versions(name: Name = "liveedit", uri: Uri = None) -> None:
    """All versions of a model, newest first, and whether their files are what was registered."""
    from pipelines.tracking import registry

    table = Table("version", "aliases", "registered", "gain", "files", box=None, pad_edge=False)
    for version in registry.versions(name, _registry(uri)):
        table.add_row(
            str(version.version),
            ", ".join(version.aliases),
            _when(version),
            version.tags.get("metric.gain", ""),
            _state(version),
        )
    console.print(table)


@models_app.command(epilog=examples("liveedit models show models:/liveedit@production"))
def show(
    reference: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    uri: Uri = None,
) -> None:
    """One version: its files, where it comes from, how it was judged, which aliases it has."""
    from modeling.model_dir import read_card

    version = find_version(reference, _registry(uri))
    tags = version.tags
    location = tags.get(LOCATION, "")
    lines = {
        "version": f"{version.name} version {version.version}",
        "aliases": ", ".join(version.aliases) or "none",
        "registered": _when(version),
        "files": f"{location} ({_state(version)})",
        "fingerprint": tags.get(FINGERPRINT, "none"),
        "run": str(version.run_id),
    }
    if (Path(location) / "card.json").is_file():
        card = read_card(location)
        for key in ("stage", "parent", "dataset", "teacher", "commit"):
            if card.get(key) is not None:
                lines[key] = str(card[key])
        if card.get("trained_at"):
            lines["trained at"] = ", ".join(card["trained_at"])
    lines |= {name: tags[name] for name in sorted(tags) if name.startswith("metric.")}
    for name, value in lines.items():
        console.print(f"  {name:<24}{value}", soft_wrap=True)


@models_app.command(epilog=examples("liveedit models promote models:/liveedit@candidate"))
def promote(
    reference: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    alias: Alias = "production",
    share: Annotated[
        float,
        typer.Option(
            help="Of new sessions, for this version; the one before gets the rest.", min=0, max=1
        ),
    ] = 1.0,
    uri: Uri = None,
) -> None:
    """Give an alias to a version, after a look at its files. What serves that alias takes it over
    within a minute; with a share below 1 it is a canary, until it is promoted without one."""
    from pipelines.tracking import registry

    _say(registry.promote(reference, alias, _registry(uri), share), alias)


@models_app.command(epilog=examples("liveedit models rollback liveedit"))
def rollback(name: Name = "liveedit", alias: Alias = "production", uri: Uri = None) -> None:
    """Give an alias back to the version that had it before."""
    from pipelines.tracking import registry

    _say(registry.rollback(name, alias, _registry(uri)), alias)


def _registry(uri: str | None) -> str:
    from pipelines.tracking.tracker import check_reachable

    uri = resolve_uri(uri)
    check_reachable(uri)
    return uri


def _say(version: ModelVersion, alias: str) -> None:
    console.print(
        f"{version.name}@{alias} is version {version.version}, {version.tags[LOCATION]}",
        soft_wrap=True,
    )


def _when(version: ModelVersion) -> str:
    moment = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _state(version: ModelVersion) -> str:
    from modeling.fingerprint import FingerprintError
    from pipelines.tracking.registry import check_files

    try:
        check_files("", version)
    except FingerprintError:
        return "CHANGED since it was registered"
    except RegistryError:
        return "not here"
    return "as registered"
