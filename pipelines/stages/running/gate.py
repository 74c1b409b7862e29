"""What a finished stage must have reached for the next one to begin: `STAGE.gate.max_loss=0.2`."""

from __future__ import annotations

from collections.abc import Mapping

from infra.runtime.errors import UserError
from pipelines.exits import GATE_MISSED


class GateMissedError(UserError):
    """A stage is finished and kept, and not good enough to go on from."""

    exit_code = GATE_MISSED


def missed(stage: str, metrics: Mapping[str, float], gate: Mapping[str, float]) -> list[str]:
    """Each bound of `gate` that `metrics` do not keep, in words; a metric that is not a number, or
    was not measured, keeps none."""
    reasons = []
    for name, bound in gate.items():
        side, _, metric = name.partition("_")
        value = metrics.get(metric, float("nan"))
        if not (value <= bound if side == "max" else value >= bound):
            relation = "above" if side == "max" else "below"
            is_there = (
                f"{metric} {value:.4g} is {relation}"
                if metric in metrics
                else (f"{metric} was not measured, for")
            )
            reasons.append(f"{is_there} {stage}.gate.{name}={bound:g}")
    return reasons


def check_gate(
    stage: str, output: str, metrics: Mapping[str, float], gate: Mapping[str, float]
) -> None:
    """Raise GateMissedError if `metrics` do not keep `gate`."""
    if reasons := missed(stage, metrics, gate):
        raise GateMissedError(
            f"stage {stage} missed its gate: {'; '.join(reasons)}. The stage is finished and kept "
            f"in {output}, nothing after it was begun. Train it on (more {stage}.steps, other "
            "settings) or set the gate elsewhere, and run the same command again"
        )
