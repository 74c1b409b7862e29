"""The rules that many settings share; each names the key, the value and what to use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pipelines.config.merge import ConfigError


def at_least(section: object, **minima: int) -> None:
    for name, minimum in minima.items():
        value = getattr(section, name)
        if value is not None and not value >= minimum:  # nor NaN
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


def check_gate(section: object, gate: Mapping[str, float], metrics: Iterable[str]) -> None:
    """A gate's names are `max_` or `min_` and a metric of the stage."""
    known = [f"{side}_{metric}" for metric in metrics for side in ("max", "min")]
    for name, value in gate.items():
        if name not in known:
            raise ConfigError(
                f"{_key(section, 'gate')}.{name} asks for no metric of that stage; there are "
                f"{', '.join(known)}"
            )
        if not math.isfinite(value):
            raise ConfigError(
                f"{_key(section, 'gate')}.{name}={value} lets nothing pass; use a number"
            )


def _key(section: object, name: str) -> str:
    return f"{type(section).SECTION}.{name}"  # type: ignore[attr-defined]
