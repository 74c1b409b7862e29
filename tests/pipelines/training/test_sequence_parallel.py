"""Every stage on two groups of two gloo ranks, each with a clip, against one process with both."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from modeling.config import MaskCacheConfig, ModelConfig, StreamConfig
from modeling.diffusion.transformer import Transformer
from modeling.model_dir import Model
from modeling.presets import PRESETS
from modeling.streaming.forward import PlainForward
from modeling.streaming.kv_cache import KVCache
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig
from pipelines.training.job import Job
from pipelines.training.methods import distill, foundation
from pipelines.training.methods.base import Setting, fast_rollouts
from pipelines.training.methods.table import build_stage
from pipelines.training.zero.engines import make_engine
from tests.modeling.networks import random_transformer
from tests.pipelines.training.plain import PlainEngine
from tests.pipelines.training.ranks import on_ranks

SHARING, GROUPS, FRAMES = 2, 2, 9  # three chunks, of which the window holds two
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
DEMO = PRESETS["demo"]
STREAM = StreamConfig(height=32, width=64, window_latents=6, sink_latents=3)
CONFIG: ModelConfig = replace(
    DEMO,
    transformer=replace(
        DEMO.transformer, dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=8, text_tokens=6
    ),
    text=replace(DEMO.text, dim=8, tokens=6),
    stream=STREAM,
)
MASKED = replace(
    CONFIG,
    stream=replace(
        STREAM,
        mask_cache=MaskCacheConfig(policy="published", scope="block", pruned_steps=(1, 2)),
    ),
)


class NotingEngine(PlainEngine):
    """Keeps the gradients of its last update, of which ranks take the mean as DeepSpeed does."""

    gradients: Tensor

    def step(self) -> None:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.gradients = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
        if getattr(self.module, "sequence", None) is not None:
            distributed.all_reduce(self.gradients)
            self.gradients /= distributed.get_world_size()
        sizes = [p.numel() for p in parameters]
        for p, mean in zip(parameters, self.gradients.split(sizes), strict=True):
            p.grad = mean.view_as(p).clone()
        super().step()


class AloneForwards:
    """As `RolloutForward`, of a network that shares its clips with nobody."""

    def __init__(self, passed: Transformer, here: Setting) -> None:
        self._passed = passed

    def renew(self) -> None:
        sequence, self._passed.sequence = self._passed.sequence, None
        self._alone = copy.deepcopy(self._passed)
        self._passed.sequence = sequence

    def __call__(self, cache: KVCache) -> PlainForward:
        return PlainForward(self._alone, cache)


def network(seed: int = 0) -> Transformer:
    return random_transformer(CONFIG.transformer, std=0.1, seed=seed)


def batch(clip: int) -> dict[str, Tensor]:
    """What the loader gives one data rank."""
    generator = torch.Generator().manual_seed(clip)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (1, FRAMES, 16, 4, 8)
    return {"source": normal(*shape), "target": normal(*shape), "text": normal(1, 5, 8)}


def setting(
    stage: str, rank: int, world: int, sharing: int, adapters: int = 0, **compute: Any
) -> Setting:
    config = PipelineConfig()
    config.compute = ComputeConfig(sequence_parallel=sharing, **compute)
    config.distill.generator_every = 1
    config.foundation.lora_rank = adapters
    here = Path("nowhere")
    job = Job(stage, config, here, "", here, here)
    return Setting(job, rank, world, torch.device("cpu"))


def train(here: Setting, config: ModelConfig = CONFIG) -> tuple[Any, dict[str, Tensor]]:
    """A stage after one step on its rank's clip, and what it logs."""
    stage = build_stage(here, Model(config, network(), None, {}, None))
    return stage, stage.step(batch(here.data_rank), here.draw(0, 0))


@dataclass
class Whole:
    """What one process with each clip for itself logs, and the mean of its networks' gradients."""

    metrics: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]


def whole(stage: str, config: ModelConfig = CONFIG, adapters: int = 0) -> Whole:
    clips = [train(setting(stage, clip, GROUPS, 1, adapters), config) for clip in range(GROUPS)]
    engines = [trained.engines for trained, _ in clips]
    mean = {
        name: torch.stack([e[name].gradients for e in engines]).mean(dim=0) for name in engines[0]
    }
    return Whole([metrics for _, metrics in clips], mean)


def compare(rank: int, stage: str, whole: Whole, config: ModelConfig = CONFIG) -> None:
    """Losses and gradients of every network."""
    own, metrics = train(setting(stage, rank, SHARING * GROUPS, SHARING), config)
    for name, value in metrics.items():
        if "grad_norm" not in name:
            clip = whole.metrics[rank // SHARING]
            torch.testing.assert_close(value, clip[name], **CLOSE, msg=name)
    for name, engine in own.engines.items():
        mean = whole.gradients[name]
        assert mean.abs().max() > 1e-3
        torch.testing.assert_close(engine.gradients, mean, **CLOSE, msg=name)


def compare_all(
    rank: int, folder: Path, wholes: dict[str, Whole], masked: Whole, adapted: Whole
) -> None:
    """With the engines and the teacher that the test has put in."""
    for stage, alone in wholes.items():
        compare(rank, stage, alone)
    distill.fast_rollouts = AloneForwards  # type: ignore[assignment]
    compare(rank, "distill", masked, MASKED)
    distill.fast_rollouts = fast_rollouts  # type: ignore[attr-defined]
    for module in (foundation, distill):
        module.make_engine = make_engine  # type: ignore[attr-defined]
    of_deepspeed(rank, wholes["foundation"], adapted)


def of_deepspeed(rank: int, plain: Whole, adapted: Whole) -> None:
    """The gradient norm that DeepSpeed finds, where weights are sharded over both kinds of ranks,
    all of them trained or adapters beside them."""
    for zero, adapters, alone in ((2, 0, plain), (3, 0, plain), (3, 2, adapted)):
        compute = {"zero_stage": zero, "activation_checkpointing": True}
        here = setting("foundation", rank, SHARING * GROUPS, SHARING, adapters, **compute)
        _, metrics = train(here)
        message = f"ZeRO-{zero}, rank {adapters}"
        norm = alone.gradients["transformer"].norm()
        torch.testing.assert_close(metrics["grad_norm"], norm, **CLOSE, msg=message)
    found = [distilled(rank, zero) for zero in (2, 3)]
    torch.testing.assert_close(*found, **CLOSE)


def distilled(rank: int, zero: int) -> dict[str, Tensor]:
    """What the second of two steps logs that each update both networks: under ZeRO-3 rollouts run
    on copies of the weights, which the first update has changed, and blocks are gathered whole."""
    compute = {"zero_stage": zero, "activation_checkpointing": True}
    here = setting("distill", rank, SHARING * GROUPS, SHARING, **compute)
    stage, first = train(here)
    second: dict[str, Tensor] = stage.step(batch(here.data_rank), here.draw(0, 0))
    assert not torch.equal(second["loss"], first["loss"])
    return second


def test_shared_clips_give_the_losses_and_gradients_of_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        distill, "_teacher", lambda here, student: (network(1), student.transformer)
    )
    # However long a busy machine takes to begin: there is no folder to say it in.
    monkeypatch.setattr("pipelines.training.methods.base._LONG_SECONDS", math.inf)
    for module in (foundation, distill):
        monkeypatch.setattr(module, "make_engine", NotingEngine)
    wholes = {stage: whole(stage) for stage in ("foundation", "causal", "distill")}
    adapted = whole("foundation", adapters=2)
    with monkeypatch.context() as patch:
        # What a GPU runs rollouts on, and a mask cache, whose tokens all must choose alike.
        patch.setattr(distill, "fast_rollouts", AloneForwards)
        masked = whole("distill", MASKED)
    compared = partial(compare_all, wholes=wholes, masked=masked, adapted=adapted)
    on_ranks(SHARING * GROUPS, compared, tmp_path)


def test_workers_that_share_a_clip_draw_the_same(tmp_path: Path) -> None:
    def drawn(rank: int, world: int, sharing: int) -> list[Tensor]:
        draw = setting("foundation", rank, world, sharing).draw(3, 1)
        return [draw.normal_like(torch.empty(9)), draw.spread(2), draw.keep(9, 0.5)]

    for rank in range(6):
        here = setting("foundation", rank, 6, 2)
        assert (here.data_rank, here.data_workers) == (rank // 2, 3)
        for own, alone in zip(drawn(rank, 6, 2), drawn(rank // 2, 3, 1), strict=True):
            assert torch.equal(own, alone)
    vae = setting("vae", 4, 6, 2)  # convolutions have no tokens to share
    assert (vae.data_rank, vae.data_workers) == (4, 6)
    assert vae.sequence is None


def _whole_pipeline(**compute: Any) -> PipelineConfig:
    return PipelineConfig(compute=ComputeConfig(**compute))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ComputeConfig(sequence_parallel=0), "sequence_parallel=0 is too small; use 1"),
        (
            lambda: ComputeConfig(workers=6, sequence_parallel=4),
            r"sequence_parallel=4 does not divide compute.workers=6 into groups; use a divisor",
        ),
        (
            lambda: _whole_pipeline(sequence_parallel=4),
            r"sequence_parallel=4 does not divide the model's 6 heads; use a divisor, such as 2",
        ),
        (
            lambda: PipelineConfig(
                compute=ComputeConfig(sequence_parallel=3),
                model=_whole_pipeline().model.__class__(stream={"height": 32, "width": 32}),
            ),
            r"does not divide the model's 4 tokens of a latent; use a divisor, such as 1",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
