"""The process's environment: read and set here alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def variable(name: str) -> str | None:
    """A variable's value; None where it is unset or empty."""
    return os.environ.get(name) or None


def everything() -> dict[str, str]:
    """All variables, for another process."""
    return dict(os.environ)


def become(values: Mapping[str, str]) -> None:
    """From now on this process has these variables and no others."""
    os.environ.clear()
    os.environ.update(values)


def set_default(name: str, value: str) -> None:
    """Set a variable for this process and its children, unless it is set."""
    os.environ.setdefault(name, value)


@contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """These variables set, or unset where None; at the end they are as they were."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def unless_set(values: Mapping[str, str]) -> dict[str, str]:
    """`values` as defaults: what the environment says of a variable goes before."""
    return {name: os.environ.get(name, value) for name, value in values.items()}


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
