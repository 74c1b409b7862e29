"""Stand-ins for what a stage tells: they remember it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipelines.tracking.records import StageRecord


class Told:
    """Takes any call, and remembers it: a run of MLflow's, a view."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given, **named: self.calls.append((name, *given, *named.values()))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class Runner(Told):
    """Does every stage's work, and keeps what `StageRunner.run` was given besides."""

    def __init__(self) -> None:
        super().__init__()
        self.view, self.parent, self.mlflow = Told(), Told(), Told()
        self.same: str | None = None
        self.inputs: Any = None
        self.given: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}

    def run(
        self, stage: str, version: int, inputs: Any, output: Any, work: Any, **given: Any
    ) -> StageRecord:
        self.same, self.inputs, self.given = given.get("same"), inputs, given
        self.metrics = work(self.mlflow, "key")
        return StageRecord(stage, "key", "fingerprint", str(output), "run", self.metrics)


def heard(module: Any, name: str, patch: pytest.MonkeyPatch, answer: Any = None) -> list[Any]:
    """The calls of `module.name`, each as its positional arguments and its named ones."""
    calls: list[Any] = []

    def stand_in(*given: Any, **named: Any) -> Any:
        calls.append((given, named))
        return answer

    patch.setattr(module, name, stand_in)
    return calls
