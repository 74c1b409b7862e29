"""Regressions: ratios of times inside one run, beside those that an earlier run stored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.runtime.errors import UserError
from pipelines.bench import SCHEMA

TOLERANCE = 0.15  # stored beside each ratio; a file may be edited to be stricter or laxer
_LABEL = "model"  # the only key of `config` that does not decide the work


def ratios(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Quotients of medians of one report, each better when smaller."""
    dense = _medians(measured["variants"]["dense"])
    values = {
        "D dense / matrix product": dense["D"] / measured["yardstick"]["ms"],
        "V dense / D dense": dense["V"] / dense["D"],
        "V dense / (encode + D + decode)": dense["V"]
        / (dense["encode"] + dense["E"] + dense["detail"]),
    }
    if "mask cache" in measured["variants"]:
        values["D mask cache / D dense"] = (
            _medians(measured["variants"]["mask cache"])["D"] / dense["D"]
        )
    if measured["plain"]:
        plain = _medians(measured["plain"])
        values["D dense / D plain"] = dense["D"] / plain["D"]
        values["VAE / VAE plain"] = (dense["encode"] + dense["decode"]) / (
            plain["encode"] + plain["decode"]
        )
    return {name: {"value": value, "tolerance": TOLERANCE} for name, value in values.items()}


def read_report(path: Path) -> dict[str, Any]:
    """A report that `--json` wrote; UserError if it is none of this version."""
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; write it with --json {path}") from error
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema}, this version reads {SCHEMA}; write it again with --json"
        )
    return dict(report)


def require_same_work(report: dict[str, Any], stored: dict[str, Any]) -> None:
    """UserError if two reports are not of the same work: then no ratio means anything.

    The machines may differ, as long as both are GPUs or both are not.
    """
    now, then = _work(report), _work(stored)
    if different := sorted(key for key in now | then if now.get(key) != then.get(key)):
        told = ", ".join(f"{key} {then.get(key)} there, {now.get(key)} here" for key in different)
        raise UserError(f"the stored report measured other work ({told}); measure the same")


@dataclass(frozen=True)
class Comparison:
    """One ratio of this run beside the stored one; smaller is better."""

    name: str
    stored: float
    now: float
    tolerance: float

    @property
    def regressed(self) -> bool:
        return self.now > self.stored * (1 + self.tolerance)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.stored:.3f} -> {self.now:.3f} "
            f"({self.now / self.stored - 1:+.0%}, allowed +{self.tolerance:.0%})"
        )


def compare(report: dict[str, Any], stored: dict[str, Any]) -> list[Comparison]:
    """The ratios of two reports of the same work."""
    require_same_work(report, stored)
    now = report["ratios"]
    return [
        Comparison(name, entry["value"], now[name]["value"], entry["tolerance"])
        for name, entry in stored["ratios"].items()
    ]


def _medians(variant: dict[str, Any]) -> dict[str, float]:
    parts = ("encode", "D", "decode", "detail", "E", "V")
    return {part: variant[part]["p50_ms"] for part in parts}


def _work(report: dict[str, Any]) -> dict[str, Any]:
    """What decides the work, flat: {"transformer.dim": 192, ...}."""
    work = {"device": report["hardware"]["device"]}
    for key, value in report["config"].items():
        if isinstance(value, dict):
            work |= {f"{key}.{inner}": item for inner, item in value.items()}
        elif key != _LABEL:
            work[key] = value
    return work
