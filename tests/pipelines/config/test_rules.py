"""Which settings may differ where a training goes on."""

from __future__ import annotations

from dataclasses import asdict, replace

from modeling.presets import PRESETS
from pipelines.config.load import section_plain
from pipelines.config.rules import training_key
from pipelines.config.stages import DistillStage


def test_a_training_goes_on_with_other_rates_and_lengths_but_not_with_other_losses() -> None:
    section = asdict(DistillStage())
    key = training_key("distill", section, start="a", seed=0)
    for name, value in {
        **{"steps": 7, "learning_rate": 1.0, "critic_learning_rate": 1.0, "warmup_steps": 3},
        **{"batch_size": 3, "grad_accumulation": 2, "weight_decay": 1.0, "betas": (0.1, 0.2)},
        **{"grad_clip": 1.0, "log_every": 3, "checkpoint_every": 4, "checkpoint_minutes": 1.0},
    }.items():
        assert training_key("distill", {**section, name: value}, start="a", seed=0) == key, name
    for name, value in {
        **{"seed": 5, "guidance": 1.0, "dmd_weight": 0.5, "edit_weight": 1.0, "ema_decay": 0.5},
        **{"generator_every": 2, "regression_weight": 1.0, "min_timestep": 1.0},
        "edit_full": 0.5,
    }.items():
        assert training_key("distill", {**section, name: value}, start="a", seed=0) != key, name
    assert training_key("distill", section, start="b", seed=0) != key
    assert training_key("distill", section, start="a", seed=1) != key
    assert training_key("causal", section, start="a", seed=0) != key


def test_settings_that_came_later_are_no_other_inputs_of_what_was_made_before() -> None:
    """Or whoever takes a new version trains everything again."""
    distill, stream = section_plain(DistillStage()), section_plain(PRESETS["demo"])["stream"]
    assert "history" not in distill
    assert "guide_blur" not in stream
    assert stream["window_latents"] == PRESETS["demo"].stream.window_latents
    assert section_plain(DistillStage(history="truth"))["history"] == "truth"
    chosen = replace(PRESETS["demo"], stream=replace(PRESETS["demo"].stream, guide_blur=0.5))
    assert section_plain(chosen)["stream"]["guide_blur"] == 0.5
