"""Means over clips with 95 % intervals, by kind and by trait: the bootstrap over clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SEED = 0
LEVELS = (0.025, 0.975)
Row = dict[str, Any]  # a clip: name, half, kind, traits, and its metrics
NOT_METRICS = ("name", "half", "kind", "traits", "instruction", "checksum")


def with_success(row: Row, success_db: float, kept_share: float) -> Row:
    """The row with `success` (the gain reaches `success_db`) or, where nothing was to be done,
    `kept` (at most `kept_share` of the blocks changed), each 0 or 1."""
    if row["kind"] == "nothing":
        return row | {"kept": float(row["false_edits"] <= kept_share)}
    return row | ({"success": float(row["gain"] >= success_db)} if "gain" in row else {})


def mean_with_interval(values: Sequence[float], resamples: int) -> dict[str, float]:
    """Mean, 2.5 and 97.5 percent points of the means of resampled clips, number of clips."""
    sample = np.asarray(values, float)
    rng = np.random.Generator(np.random.PCG64(SEED))
    means = sample[rng.integers(len(sample), size=(resamples, len(sample)))].mean(axis=1)
    low, high = np.quantile(means, LEVELS)
    return {
        "mean": float(sample.mean()),
        "low": float(low),
        "high": float(high),
        "clips": len(sample),
    }


def summarise(rows: Sequence[Row], resamples: int) -> dict[str, dict[str, float]]:
    """Every metric of `rows` over the clips that have it."""
    names = sorted({name for row in rows for name in row if name not in NOT_METRICS})
    return {
        name: mean_with_interval([row[name] for row in rows if name in row], resamples)
        for name in names
    }


def groups(rows: Sequence[Row], resamples: int) -> dict[str, Any]:
    """`overall` (both halves and each), `kinds` worst first, `traits`."""
    halves = sorted({row["half"] for row in rows})
    overall = {"all": summarise(rows, resamples)} if len(halves) > 1 else {}
    overall |= {h: summarise([r for r in rows if r["half"] == h], resamples) for h in halves}
    kinds = {}
    for half, kind in {(row["half"], row["kind"]): None for row in rows}:
        of = [row for row in rows if (row["half"], row["kind"]) == (half, kind)]
        kinds[f"{half}, {kind}"] = summarise(of, resamples)
    traits = {trait: None for row in rows for trait in row["traits"] if trait not in halves}
    return {
        "overall": overall,
        "kinds": dict(sorted(kinds.items(), key=_goodness)),
        "traits": {
            trait: summarise([row for row in rows if trait in row["traits"]], resamples)
            for trait in sorted(traits)
        },
    }


def _goodness(kind: tuple[str, dict[str, dict[str, float]]]) -> tuple[bool, float, str]:
    """Worst first; what has no gain comes last, as nothing was to be done there."""
    name, values = kind
    shown = values.get("gain", values.get("kept_psnr", {}))
    return "gain" not in values, shown.get("mean", 0.0), name
