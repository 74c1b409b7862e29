"""Every limit of the configuration, from tables: what lies on it passes, what lies beyond is
refused in a message that names key, value and remedy.

A number that no table knows fails `test_the_tables_know_every_number`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.config.merge import ConfigError, _dotted
from pipelines.config.pipeline import PipelineConfig
from tests.pipelines.config.passing import STAGES, accept

MINIMA = {
    "data.pairs": 1,
    "data.heldout_pairs": 1,
    "data.samples_per_shard": 1,
    "data.workers": 0,
    "data.encode_batch": 1,
    "evaluate.clips": 1,
    "evaluate.dilate": 0,
    "compute.workers": 1,
    "compute.threads_per_worker": 1,
    "compute.loader_workers": 0,
    "compute.max_failures": 0,
    "compute.keep_checkpoints": 1,
    "compute.hang_minutes": 0,
    "vae.motion": 0,
    "vae.edge_weight": 0,
    "vae.square_weight": 0,
    "vae.scale_weight": 0,
    "vae.latent_noise": 0,
    "vae.statistics_clips": 1,
    "distill.generator_every": 1,
    "distill.dmd_weight": 0,
    "distill.regression_weight": 0,
    **{f"{stage}.{key}": 0 for stage in STAGES for key in ("steps", "warmup_steps")},
    **{f"{stage}.{key}": 0 for stage in STAGES for key in ("weight_decay", "grad_clip")},
    **{f"{stage}.{key}": 1 for stage in STAGES for key in ("batch_size", "grad_accumulation")},
    **{f"{stage}.{key}": 1 for stage in STAGES for key in ("log_every", "checkpoint_every")},
    **{f"{stage}.checkpoint_minutes": 0 for stage in STAGES},
    **{f"{stage}.{key}": 0 for stage in STAGES for key in ("validate_every", "sample_clips")},
    **{f"{stage}.validate_clips": 1 for stage in STAGES},
    **{f"{stage}.profile": 0 for stage in STAGES},
    **{
        f"{stage}.{name}": 0
        for stage in ("foundation", "causal")
        for name in ("lora_rank", "keep_products")
    },
    "distill.keep_products": 0,
}

ABOVE_0 = (
    "compute.cpus_per_worker",
    "foundation.shift",
    "causal.shift",
    "foundation.lora_alpha",
    "causal.lora_alpha",
    "distill.critic_learning_rate",
    *(f"{stage}.edit_full" for stage in ("foundation", "causal", "distill")),
    *(f"{stage}.learning_rate" for stage in STAGES),
)

SHARES = (
    "vae.noise_warmup",
    "foundation.text_dropout",
    "foundation.source_dropout",
    "causal.text_dropout",
    "causal.source_dropout",
    "distill.ema_decay",
    *(f"{stage}.final_learning_rate" for stage in STAGES),
)

NAN = float("nan")
REMEDY = re.compile(r"use \d|; use a number above 0|must |set |is a share; use 0 to 1")


def value_of(config: object, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def limits() -> Iterator[tuple[str, Any, bool]]:
    """(key, value, whether it passes) on both sides of every limit."""
    for key, least in MINIMA.items():
        kind = type(value_of(PipelineConfig(), key))
        yield from ((key, value, value >= least) for value in (least, least + 1, least - 1))
        if kind is float:
            yield from ((key, value, False) for value in (-0.001, NAN))
    for key in ABOVE_0:
        yield from ((key, value, value == 0.001) for value in (0.001, 0.0, -1.0, NAN))
    for key in SHARES:
        good, bad = (0.0, 0.5, 1.0), (-0.001, 1.001, NAN)
        yield from ((key, value, value in good) for value in good + bad)
    for stage in STAGES:
        for betas in ((0.0, 0.0), (0.999, 0.5), (0.5, 0.999)):
            yield f"{stage}.betas", betas, True
        for betas in ((1.0, 0.5), (0.5, 1.0), (-0.1, 0.5), (0.5, -0.1), (NAN, 0.5)):
            yield f"{stage}.betas", betas, False
    passing = {
        "compute.sequence_parallel": ((1,), (-1, 0)),  # the model's heads are 7
        "compute.zero_stage": ((0, 1, 2, 3), (-1, 4)),
        "vae.clip_frames": ((1, 5, 9, 33), (-3, 0, 8, 10, 37)),  # data.frames is 33
        "vae.crop": ((None, 8, 64, 128), (-8, 0, 4, 60, 136)),  # the model's height is 128
        "distill.min_timestep": ((0.0, 979.5), (-1.0, 980.0, 981.0, NAN)),
        "distill.max_timestep": ((1000.0, 20.5), (1000.5, 20.0, NAN)),
        "distill.gradient_chunks": ((None, 1), (-1, 0)),
        "distill.scored_chunks": ((None, 1), (-1, 0)),
    }
    for key, (good, bad) in passing.items():
        yield from ((key, value, True) for value in good)
        yield from ((key, value, False) for value in bad)


@pytest.mark.parametrize(("key", "value", "passes"), list(limits()))
def test_limits(demo: PipelineConfig, key: str, value: Any, passes: bool) -> None:
    given = {key.replace(".", "__"): value}
    if passes:
        accept(demo, **given)
        return
    with pytest.raises(ConfigError) as refused:
        accept(demo, **given)
    shown = f"{value:g}" if isinstance(value, float) and "timestep" in key else str(value)
    shown = shown.replace("(", "[").replace(")", "]")
    message = str(refused.value)
    assert f"{key}={shown} " in message
    assert REMEDY.search(message), message


@pytest.mark.parametrize(
    ("learn", "scored", "passes"),
    [(None, 2, True), (2, None, True), (1, 2, True), (2, 2, True), (3, 2, False)],
)
def test_as_many_chunks_learn_as_are_scored_at_most(
    demo: PipelineConfig, learn: int | None, scored: int | None, passes: bool
) -> None:
    given = {"distill__gradient_chunks": learn, "distill__scored_chunks": scored}
    if passes:
        accept(demo, **given)
        return
    told = r"distill\.gradient_chunks=3 is more than distill\.scored_chunks=2: .*lower it"
    with pytest.raises(ConfigError, match=told):
        accept(demo, **given)


def test_the_tables_know_every_number() -> None:
    """A new key belongs into a table, or into this list of those that may be anything."""
    free = {
        *("seed", "data.seed", "evaluate.seed", "evaluate.success_db"),
        *("evaluate.min_gain_db", "evaluate.min_background_db"),
        *(f"{stage}.edit_weight" for stage in ("foundation", "causal", "distill")),
        "distill.guidance",
    }
    # have tests of their own
    others = {"data.frames", *(f"{stage}.patience" for stage in STAGES)}
    config = PipelineConfig()
    numbers = {name for name in _dotted(config) if type(value_of(config, name)) in (int, float)}
    assert numbers - {key for key, _, _ in limits()} == free | others
