"""What DeepSpeed and the optimizer are told, and what an update tells; without DeepSpeed."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling.diffusion.transformer import Block
from pipelines.config.stages import ComputeConfig, TrainedStage
from pipelines.training.zero import engines
from pipelines.training.zero.engines import (
    deepspeed_config,
    gather_by_block,
    learning_rate_at,
    make_engine,
    set_learning_rate,
    update,
)


def test_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    stage = TrainedStage(steps=21, warmup_steps=4, final_learning_rate=0.1)
    rates = [learning_rate_at(step, stage, 1.0) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert rates[12] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    constant = TrainedStage(steps=3, warmup_steps=0)
    assert [learning_rate_at(step, constant, 2.0) for step in range(3)] == [2.0, 2.0, 2.0]


def test_deepspeed_is_told_what_the_stage_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def initialize(**options: Any) -> tuple[SimpleNamespace]:
        told.update(options)
        return (SimpleNamespace(module=options["model"]),)

    deepspeed = SimpleNamespace(initialize=initialize)
    monkeypatch.setattr(engines, "import_deepspeed", lambda: deepspeed)
    stage = TrainedStage(
        batch_size=3, grad_accumulation=5, grad_clip=0.7, betas=(0.2, 0.4), weight_decay=0.3
    )
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)).requires_grad_(False)
    compute = ComputeConfig(precision="bf16", zero_stage=1)
    engine = make_engine(net, compute, stage, 1e-2)
    assert engine.module is net
    assert not net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    config = told["config"]
    assert config == deepspeed_config(compute, stage)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"]["enabled"]
    assert config["zero_optimization"] == {"stage": 1}
    fp32 = deepspeed_config(ComputeConfig(zero_stage=3), stage)
    assert not fp32["bf16"]["enabled"]
    assert fp32["zero_optimization"] == {"stage": 3, "memory_efficient_linear": True}
    host = {"device": "cpu", "pin_memory": False}
    for offload, moved in (("optimizer", ["offload_optimizer"]),
                           ("weights", ["offload_optimizer", "offload_param"])):  # fmt: skip
        there = ComputeConfig(zero_stage=3, offload=offload)  # type: ignore[arg-type]
        zero = deepspeed_config(there, stage)["zero_optimization"]
        assert {n: v for n, v in zero.items() if "offload" in n} == dict.fromkeys(moved, host)
    optimizer = told["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    weights, others = optimizer.param_groups
    assert weights["params"] == [net[0].weight, net[2].weight]  # type: ignore[index]
    assert others["params"] == [net[0].bias, net[2].bias]  # type: ignore[index]
    assert (weights["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    for group in (weights, others):
        assert group["lr"] == 1e-2
        assert group["betas"] == (0.2, 0.4)
    set_learning_rate(SimpleNamespace(optimizer=optimizer), 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_blocks_are_gathered_whole_where_weights_are_split(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    deepspeed = SimpleNamespace(
        utils=SimpleNamespace(set_z3_leaf_modules=lambda *of: told.append(of))
    )
    monkeypatch.setattr(engines, "import_deepspeed", lambda: deepspeed)
    network = nn.Linear(1, 1)
    gather_by_block(network, ComputeConfig(zero_stage=stage))  # type: ignore[arg-type]
    assert told == ([(network, [Block])] if stage == 3 else [])


@pytest.mark.parametrize(
    ("norm", "found"), [(None, 0.0), (2.5, 2.5), (torch.tensor(1.5, dtype=torch.bfloat16), 1.5)]
)
def test_an_update_gives_the_norm_at_the_end_of_an_accumulation(norm: Any, found: float) -> None:
    done: list[str] = []
    engine = SimpleNamespace(
        is_gradient_accumulation_boundary=lambda: len(done) >= 2,
        backward=lambda loss: done.append(f"backward {loss}"),
        step=lambda: done.append("step"),
        get_global_grad_norm=lambda: norm,
    )
    assert update(engine, torch.tensor(3.0)) is None
    assert done == ["backward 3.0", "step"]
    last = update(engine, torch.tensor(4.0))
    assert done[2:] == ["backward 4.0", "step"]
    assert isinstance(last, Tensor)
    assert last.dtype == torch.float32
    assert last.item() == found


@pytest.mark.parametrize(
    ("step", "steps", "warmup", "floor", "expected"),
    [
        (0, 1, 0, 0.5, 1.0),  # a single step runs at the peak
        (0, 11, 0, 0.0, 1.0),
        (5, 11, 0, 0.0, 0.5),
        (10, 11, 0, 0.0, 0.0),
        (99, 11, 0, 0.2, 0.2),  # never below, never up again
        (0, 10, 9, 0.0, 0.1),
        (9, 10, 9, 0.0, 1.0),
        (3, 4, 100, 0.0, 4 / 101),  # a warm-up that is longer than the stage
        (4, 11, 2, 0.5, 0.5 + 0.25 * (1 + math.cos(math.pi / 4))),
    ],
)
def test_learning_rates_by_hand(
    step: int, steps: int, warmup: int, floor: float, expected: float
) -> None:
    stage = TrainedStage(steps=steps, warmup_steps=warmup, final_learning_rate=floor)
    assert learning_rate_at(step, stage, 3.0) == pytest.approx(3 * expected)


@pytest.mark.parametrize(("stage", "precision", "dtype"), [
    (2, "bf16", None), (3, "bf16", torch.bfloat16), (3, "fp32", torch.float32),
])  # fmt: skip
def test_what_no_rank_can_hold_is_split_before_an_engine_is_made_of_it(
    stage: int, precision: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []

    def initialize(**options: Any) -> tuple[SimpleNamespace]:
        done.append("engine")
        return (SimpleNamespace(module=options["model"]),)

    def split(network: nn.Module, config: dict[str, Any]) -> None:
        done.append(next(network.parameters()).dtype)
        assert config == deepspeed_config(compute, TrainedStage())

    monkeypatch.setattr(engines, "import_deepspeed", lambda: SimpleNamespace(initialize=initialize))
    monkeypatch.setattr(engines, "shard", split)
    compute = ComputeConfig(zero_stage=stage, precision=precision)  # type: ignore[arg-type]
    make_engine(nn.Linear(2, 2), compute, TrainedStage(), 1e-2)
    assert done == ([dtype] if dtype else []) + ["engine"]
