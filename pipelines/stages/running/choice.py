"""Which stages of a pipeline a command means, and whether one is finished.

`--from` and `--only` choose; what comes before must be finished, and is never run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config.merge import ConfigError
from pipelines.tracking.records import StageRecord, fingerprint_of, key_of
from pipelines.tracking.tracker import flatten

FINGERPRINT = 64  # characters of a hash
_SHOWN = 3  # changed inputs that one line names


@dataclass(frozen=True)
class Choice:
    """All stages, those from `first` on, or `only` one. Raises ConfigError for a wrong name."""

    stages: tuple[str, ...]
    first: str | None = None
    only: str | None = None

    def __post_init__(self) -> None:
        for option, stage in (("--from", self.first), ("--only", self.only)):
            if stage is not None and stage not in self.stages:
                raise ConfigError(f"{option} {stage}: there are {', '.join(self.stages)}")
        if self.first is not None and self.only is not None:
            raise ConfigError(
                f"--from {self.first} and --only {self.only} exclude each other; give one"
            )

    def comes_before(self, stage: str) -> bool:
        """Whether `stage` comes before what was chosen. One that no pipeline has comes after."""
        begin = self.only or self.first
        if begin is None or stage not in self.stages:
            return False
        return self.stages.index(stage) < self.stages.index(begin)

    def is_last(self, stage: str) -> bool:
        return stage == self.only


def key_for(stage: str, version: int, inputs: Mapping[str, Any]) -> str:
    return key_of({"stage": stage, "version": version, **inputs})


def why_again(
    record: StageRecord | None, stage: str, version: int, inputs: Mapping[str, Any]
) -> str | None:
    """Why a stage must run for these inputs, in a few words; None if it need not."""
    if record is None:
        return "not done yet"
    if record.key != key_for(stage, version, inputs):
        if not record.inputs:  # written before records said so
            return "other inputs"
        return _differences(record.inputs, inputs) or "other code"
    return None if is_intact(record) else f"{record.output} is gone or changed"


def is_intact(record: StageRecord) -> bool:
    """Whether what the stage left is still as it left it."""
    return record.fingerprint == fingerprint_of(record.output)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = flatten(before), flatten(now)
    changed = [
        _change(name, old.get(name), new.get(name))
        for name in dict.fromkeys([*old, *new])
        if _plain(old.get(name)) != _plain(new.get(name))
    ]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return ", ".join(changed[:_SHOWN]) + more


def _change(name: str, old: Any, new: Any) -> str:
    name = name.removeprefix("config.")
    if any(isinstance(value, str) and len(value) == FINGERPRINT for value in (old, new)):
        return f"another {name}"
    return f"{name} {old} -> {new}"


def _plain(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return list(value) if isinstance(value, tuple) else value
