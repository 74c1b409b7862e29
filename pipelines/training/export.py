"""The model directory that a stage leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from modeling.model_dir import Model, save_model
from pipelines.training.methods.base import Setting, Stage


def export_model(
    setting: Setting,
    stage: Stage,
    model: Model,
    metrics: dict[str, float],
    steps: int,
    output: Path,
) -> None:
    """Rank 0 writes the model directory; parts that the stage did not train are the start's."""
    made = stage.export()
    if setting.rank != 0:
        return
    config = model.config
    if made.vae_config is not None:
        config = replace(config, vae=made.vae_config)
    transformer = made.transformer
    if transformer is None and model.transformer is not None:
        transformer = model.transformer.state_dict()
    if transformer is not None:  # the VAE stays float32: it is small, and latents depend on it
        transformer = {name: value.to(setting.dtype) for name, value in transformer.items()}
    text = setting.job.start / "text"
    save_model(
        output,
        config,
        transformer=transformer,
        vae=made.vae or model.vae,
        text=text if text.is_dir() else None,
        card={**setting.job.card, **made.card, "steps": steps, "metrics": metrics},
    )
