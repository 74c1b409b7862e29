"""Where this tree lies, and where what it makes lies unless told otherwise."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = Path("runs")  # pipelines' outputs and MLflow's database, in the working directory


def find_path(path: str) -> Path:
    """`path` as it counts from the working directory or, where nothing is there, from this tree:
    recipes name what ships."""
    here = Path(path).absolute()
    return here if here.exists() else ROOT / path
