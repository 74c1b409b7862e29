"""Layers of settings over a dataclass, with errors that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from infra.runtime.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that cannot run; the message names the key, the value and the remedy."""


def parse_overrides(overrides: Iterable[str]) -> Any:
    """`["data.pairs=4"]` as a config; what has no `=` is a ConfigError."""
    entries = list(overrides)
    for entry in entries:
        key, equals, _ = entry.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{entry!r} is not key=value; write for example foundation.steps=100")
    return OmegaConf.from_dotlist(entries)


def plain_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The same as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(parse_overrides(overrides)))


def merge(base: T, layers: list[tuple[str, Any]], prefix: str = "") -> T:
    """`base` (a dataclass) with the layers over it; errors name the layer and the full key."""
    config = OmegaConf.structured(base)
    OmegaConf.set_readonly(config, False)  # a frozen dataclass is read-only, also for merging
    for origin, layer in layers:
        try:
            config = OmegaConf.merge(config, layer)
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list for a section
            key = getattr(error, "full_key", None) or _misfit(config, layer)
            raise ConfigError(f"{origin}: {_explain(error, base, prefix, key)}") from error
    try:
        return cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, base, prefix, error.full_key)) from error
    except ValueError as error:  # a dataclass's own __post_init__
        raise ConfigError(f"{prefix}{error}") from error


def _misfit(config: Any, layer: Any, above: tuple[Any, ...] = ()) -> str:
    """The key of the first value in `layer` that does not fit: where a section or list gets a
    value of another kind, OmegaConf names none."""
    values = OmegaConf.to_container(layer) if OmegaConf.is_config(layer) else layer
    for name, value in values.items() if isinstance(values, dict) else ():
        path = (*above, name)
        if found := _misfit(config, value, path):
            return found
        for part in reversed(path):
            value = {part: value}
        try:
            OmegaConf.merge(config, value)
        except (OmegaConfBaseException, TypeError):
            return ".".join(map(str, path))
    return ""


def _explain(error: Exception, base: object, prefix: str, key: str | None) -> str:
    key = f"{prefix}{key or ''}"
    first_line = str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        known = [prefix + name for name in _dotted(base)]
        if not prefix:
            known += [entry.name for entry in fields(cast(Any, base))]  # sections
        known = list(dict.fromkeys(known))
        close = difflib.get_close_matches(key, known, n=2, cutoff=0.6) or [
            name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
        ]
        level = sorted({name.split(".")[0] for name in known} if not prefix else known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(level)}"
        return f"unknown key {key!r}; {hint}"
    return f"{key}: {first_line}" if key else first_line


def _dotted(owner: object, prefix: str = "") -> list[str]:
    names: list[str] = []
    for entry in fields(cast(Any, owner)):
        value = getattr(owner, entry.name)
        name = prefix + entry.name
        names += _dotted(value, f"{name}.") if is_dataclass(value) else [name]
    return names
