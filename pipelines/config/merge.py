"""Layers of settings over a dataclass, with errors that a person can act on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from infra.runtime.errors import UserError

T = TypeVar("T")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class ConfigError(UserError):
    """A configuration that cannot run; the message names the key, the value and the remedy."""


def parse_overrides(overrides: Iterable[str], example: str = "foundation.steps=100") -> Any:
    """`["data.pairs=4"]` as a config; what has no `=` is a ConfigError that shows `example`."""
    entries = list(overrides)
    for entry in entries:
        key, equals, _ = entry.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{entry!r} is not key=value; write for example {example}")
    return OmegaConf.from_dotlist(entries)


def plain_overrides(overrides: Iterable[str], example: str) -> dict[str, Any]:
    """The same as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(parse_overrides(overrides, example)))


def merge(base: T, layers: list[tuple[str, Any]], prefix: str = "") -> T:
    """`base` (a dataclass) with the layers over it; errors name the layer and the full key."""
    return _merged(base, _described(base), layers, prefix)


def merge_defaults(kind: type[T], layers: list[tuple[str, Any]]) -> T:
    """The same over a dataclass's defaults, which are described to OmegaConf once."""
    return _merged(kind(), _defaults(cast(Any, kind)), layers)


@cache
def _defaults(kind: type) -> Any:
    return _described(kind())


def _described(base: object) -> Any:
    """For OmegaConf; of a whole pipeline it takes longer than all the rest of a merge."""
    config = OmegaConf.structured(base)
    OmegaConf.set_readonly(config, False)  # a frozen dataclass is read-only, also for merging
    return config


def _merged(base: T, config: Any, layers: list[tuple[str, Any]], prefix: str = "") -> T:
    """`config` describes `base` and stays as it is."""
    wrong = (OmegaConfBaseException, TypeError)  # TypeError: a list for a section
    try:
        config = OmegaConf.merge(config, *(layer for _, layer in layers))  # each merge copies it
    except wrong:
        for origin, layer in layers:
            try:
                config = OmegaConf.merge(config, layer)
            except wrong as error:
                key = getattr(error, "full_key", None) or _misfit(config, layer)
                raise ConfigError(
                    f"{origin}: {_explain(error, base, prefix, key, layer)}"
                ) from error
    try:
        merged = cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, base, prefix, error.full_key)) from error
    except ValueError as error:  # a dataclass's own __post_init__
        raise ConfigError(f"{prefix}{error}") from error
    for name in _dotted(merged):
        value = _at(merged, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{name}={value} is nothing to work with; use a number")
    return merged


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


def _explain(
    error: Exception, base: object, prefix: str, key: str | None, layer: Any = None
) -> str:
    key = f"{prefix}{key or ''}"
    known = [prefix + name for name in _dotted(base)]
    if isinstance(error, ConfigKeyError):
        whole = _with_what_is_below(key.removeprefix(prefix), layer)
        return _unknown([prefix + whole, key], known, prefix)
    below = [name for name in known if key and name.startswith(f"{key}.")]
    if below:
        return f"{key} is a section; give one of its keys a value, as in {below[0]}=..."
    if key in known:
        return _unfit(key, base, key.removeprefix(prefix), layer)
    first_line = str(error).splitlines()[0]
    return f"{key}: {first_line}" if key else first_line


def _unfit(key: str, base: object, name: str, layer: Any) -> str:
    """About a value of the wrong kind for the field `name` of `base`."""
    section, _, own = name.rpartition(".")
    owner = _at(base, section) if section else base
    hint: Any = get_type_hints(type(owner))[own]
    if type(None) in get_args(hint):
        hint = get_args(hint)[0]
    default = getattr(owner, own)
    if get_origin(hint) is Literal:
        kind = f"one of {', '.join(map(str, get_args(hint)))}"
    elif get_origin(hint) is tuple:
        count = "" if Ellipsis in get_args(hint) else f" of {len(get_args(hint))}"
        kind = f"a list{count}, as in {key}=[{','.join(map(str, default or ()))}]"
    elif get_origin(hint) is dict:
        kind = f"keys with values, as in {key}.NAME=1"
    else:
        kind = KINDS.get(hint, str(hint))
    given = _at(OmegaConf.to_container(layer) if OmegaConf.is_config(layer) else layer, name)
    return f"{key}={'' if given is None else given} must be {kind}"


def _at(owner: Any, name: str) -> Any:
    """The value under a dotted name, of dataclasses or mappings; None where there is none."""
    for part in name.split("."):
        owner = owner.get(part) if isinstance(owner, dict) else getattr(owner, part, None)
    return owner


def _with_what_is_below(key: str, layer: Any) -> str:
    """The key that was given, as in foundatoin.steps, of which OmegaConf names the first part."""
    value = OmegaConf.to_container(layer) if OmegaConf.is_config(layer) else layer
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    while isinstance(value, dict) and len(value) == 1:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _unknown(keys: list[str], known: list[str], prefix: str) -> str:
    """About the whole key that was given, and its first part that is unknown."""
    section = keys[0].rpartition(".")[0]
    beside = [name for name in known if section and name.rpartition(".")[0] == section]
    there = beside or (known if prefix else sorted({name.split(".")[0] for name in known}))
    hints = [_meant(key, known) for key in keys]
    hint = next(filter(None, hints), f"there are {', '.join(there)}")
    return f"unknown key {keys[0]!r}; {hint}"


def _meant(key: str, known: list[str]) -> str:
    """Keys like this one in its section, else those in others whose own name is like its."""
    section, _, name = key.rpartition(".")
    names: dict[str, list[str]] = {}  # own name -> keys
    for whole in known:
        names.setdefault(whole.rpartition(".")[2], []).append(whole)
    beside = [own for own, keys in names.items() if f"{section}.{own}".strip(".") in keys]
    close = [f"{section}.{own}".strip(".") for own in difflib.get_close_matches(name, beside, n=2)]
    if not close:
        keys = [k for own in difflib.get_close_matches(name, names, n=1) for k in names[own]]
        sections = {k.rpartition(".")[0]: k for k in keys}
        close = [sections[s] for s in difflib.get_close_matches(section, sections, n=1)] or keys
    return f"did you mean {' or '.join(close)}?" if close else ""


def _dotted(owner: object, prefix: str = "") -> list[str]:
    names: list[str] = []
    for entry in fields(cast(Any, owner)):
        value = getattr(owner, entry.name)
        name = prefix + entry.name
        names += _dotted(value, f"{name}.") if is_dataclass(value) else [name]
    return names
