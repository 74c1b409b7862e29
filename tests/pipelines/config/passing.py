"""A configuration with which all stages run, and copies of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipelines.config.pipeline import PipelineConfig

# Nothing of the demo's own is in the way: pairs that are somewhere, a start, all stages run.
BASE = ("data.train=somewhere", "tracking.uri=sqlite:////tmp/never-made.db")

STAGES = ("vae", "foundation", "causal", "distill")


def accept(config: PipelineConfig, **values: Any) -> PipelineConfig:
    """A copy with `section__key=value`, if it may be."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition("__")
        sections.setdefault(section, {})[key] = value
    return replace(config, **{s: replace(getattr(config, s), **v) for s, v in sections.items()})
