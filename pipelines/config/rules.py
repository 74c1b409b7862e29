"""The rules that many settings share; each names the key, the value and what to use."""

from __future__ import annotations

from pipelines.config.merge import ConfigError


def at_least(section: object, **minima: int) -> None:
    for name, minimum in minima.items():
        value = getattr(section, name)
        if value is not None and value < minimum:
            raise ConfigError(f"{_key(section, name)}={value} is too small; use {minimum} or more")


def above_0(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not value > 0:  # nor NaN
            raise ConfigError(f"{_key(section, name)}={value} is too small; use a number above 0")


def shares(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{_key(section, name)}={value} is a share; use 0 to 1")


def _key(section: object, name: str) -> str:
    return f"{type(section).SECTION}.{name}"  # type: ignore[attr-defined]
