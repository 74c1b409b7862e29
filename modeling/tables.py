"""Named choices of one kind: where something new is entered, and a wrong name is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn, TypeVar

from infra.runtime.errors import UserError

T = TypeVar("T")


class Table(dict[str, T]):
    """What can be chosen by name as `kind`; looking up another name is a UserError that lists all.

    `get` and `in` are a dict's own.
    """

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        super().__init__(entries)
        self.kind = kind

    def __missing__(self, name: object) -> NoReturn:
        raise UserError(f"unknown {self.kind} {name!r}; there are {', '.join(sorted(self))}")
