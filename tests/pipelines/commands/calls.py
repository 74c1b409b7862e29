"""What a command line comes to: the calls that it makes, instead of which it makes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from importlib import import_module
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pipelines.cli import app


@dataclass(frozen=True)
class Case:
    """`reaches` (module.function) is called with `given`: arguments, or what lies in them, by
    name, such as `config.seed`. On the way `beside` answer in the place of what they name."""

    words: str
    reaches: str
    given: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)


class Arrived(Exception):  # noqa: N818  # no error: all that is looked at has been
    """The call is made; what comes after it is not looked at."""


def run(
    case: Case, monkeypatch: pytest.MonkeyPatch, *, answer: Any = None, **named: object
) -> tuple[Any, list[Any]]:
    """The command's result and the calls of `case.reaches`, their arguments by name; the first
    ends it unless there is an `answer`. `named` stand in braces in its words."""
    calls: list[dict[str, Any]] = []
    for name, said in case.beside.items():
        _replace(name, lambda *_, said=said, **__: said, monkeypatch)
    module, _, function = case.reaches.rpartition(".")
    signature = inspect.signature(getattr(import_module(module), function))

    def stand_in(*given: Any, **more: Any) -> Any:
        bound = signature.bind(*given, **more)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments |= arguments.pop("options", {}) if _gathers(signature) else {}
        calls.append(arguments)
        if answer is None:
            raise Arrived
        return answer

    _replace(case.reaches, stand_in, monkeypatch)
    words = [word.format(**named) for word in case.words.split()]
    return CliRunner().invoke(app, words, standalone_mode=False), calls


def found(arguments: dict[str, Any], name: str) -> Any:
    first, *within = name.split(".")
    return reduce(getattr, within, arguments[first])


def parameters() -> Iterator[tuple[str, Any]]:
    """Every option and argument of every command, each with the command's words."""

    def of(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield from of(inner, (*path, name))
        if not hasattr(command, "commands"):
            for parameter in command.params:
                yield " ".join(path), parameter

    return of(get_command(app), ())


def options() -> Iterator[tuple[str, str]]:
    """Every option of every command: the command's words and the option's longest name."""
    for command, parameter in parameters():
        if parameter.param_type_name == "option":
            yield command, max(parameter.opts, key=len)


def _gathers(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _replace(name: str, stand_in: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, attribute = name.rpartition(".")
    monkeypatch.setattr(import_module(module), attribute, stand_in)
