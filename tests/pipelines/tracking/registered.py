"""Versions as the tests of the registry register them."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from modeling.fingerprint import model_fingerprint
from pipelines.tracking import registry
from pipelines.tracking.tracker import Tracker


def register(uri: str, model: Path, *aliases: str, fingerprint: str = "") -> str:
    run = Tracker.start_pipeline(uri, "liveedit", "demo", {})
    return registry.register(
        uri,
        "liveedit",
        model,
        run_id=run.run_id,
        fingerprint=fingerprint or model_fingerprint(model),
        metrics={"gain": 4.5},
        aliases=aliases,
    )


def changed(model: Path, target: Path) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(model, target)
    weights = load_file(target / "vae.safetensors")
    weights[min(weights)] += 1
    save_file(weights, target / "vae.safetensors")
    return target
