"""The rules that many settings share; each names the key, the value and what to use.

And which of a trained stage's settings may differ where the same training goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.config.merge import ConfigError
from pipelines.tracking.records import key_of

# Settings that change nothing of what a training makes.
WATCHING = (
    *("log_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "gate"),
    *("validate_every", "validate_clips", "sample_clips", "rollout_copy", "profile"),
    "keep_products",
)
# Settings that decide which of a training's models is the result, if they are set.
CHOOSING = ("keep_best", "patience")
# Settings with which a training may go on that was begun with others.
MAY_CHANGE = (
    *("steps", "learning_rate", "critic_learning_rate", "final_learning_rate", "warmup_steps"),
    *("batch_size", "grad_accumulation", "weight_decay", "betas", "grad_clip"),
    *CHOOSING,
    *WATCHING,
)


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


def training_key(stage: str, section: Mapping[str, Any], **inputs: Any) -> str:
    """The hash of what a training must have in common with one that it goes on from: stage, losses
    and draws (`section` without what may change), and `inputs`."""
    same = {name: value for name, value in section.items() if name not in MAY_CHANGE}
    return key_of({"stage": stage, "section": same, **inputs})


def _key(section: object, name: str) -> str:
    return f"{type(section).SECTION}.{name}"  # type: ignore[attr-defined]
