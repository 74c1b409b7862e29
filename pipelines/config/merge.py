"""Layers of settings over a dataclass, with errors that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, the value and the remedy."""


def parse_overrides(overrides: Iterable[str]) -> Any:
    """`["data.pairs=4"]` as a config; what has no `=` is a ConfigError."""
    entries = list(overrides)
    for entry in entries:
        key, equals, _ = entry.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{entry!r} is not key=value; write for example foundation.steps=100")
    return OmegaConf.from_dotlist(entries)


def merge(base: T, layers: list[tuple[str, Any]], prefix: str = "") -> T:
    """`base` (a dataclass) with the layers over it; errors name the layer and the full key."""
    config = OmegaConf.structured(base)
    OmegaConf.set_readonly(config, False)  # a frozen dataclass is read-only, also for merging
    for origin, layer in layers:
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {_explain(error, base, prefix)}") from error
    try:
        return cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, base, prefix)) from error
    except ValueError as error:  # a dataclass's own __post_init__
        raise ConfigError(f"{prefix}{error}") from error


def _explain(error: OmegaConfBaseException, base: object, prefix: str) -> str:
    key = f"{prefix}{error.full_key or ''}"
    first_line = str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        known = [prefix + name for name in _dotted(base)]
        if not prefix:
            known += [entry.name for entry in fields(cast(Any, base))]  # sections
        close = difflib.get_close_matches(key, known, n=2, cutoff=0.6) or [
            name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
        ]
        level = sorted({name.split(".")[0] for name in known} if not prefix else known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(level)}"
        return f"unknown key {key!r}; {hint}"
    if isinstance(error, ValidationError):
        return f"{key or 'section'}: {first_line}"
    return first_line


def _dotted(owner: object, prefix: str = "") -> list[str]:
    names: list[str] = []
    for entry in fields(cast(Any, owner)):
        value = getattr(owner, entry.name)
        name = prefix + entry.name
        names += _dotted(value, f"{name}.") if is_dataclass(value) else [name]
    return names
