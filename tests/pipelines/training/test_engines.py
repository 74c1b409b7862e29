"""DeepSpeed as the stages use it, on two gloo ranks against one process without DeepSpeed.

These guard upgrades: several engines in a process, gradients that pass through another network,
float32 masters and their average are where DeepSpeed has been wrong without an error.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from modeling.diffusion.losses import dmd_gradient, gradient_as_loss
from pipelines.config.stages import ComputeConfig, TrainedStage
from pipelines.training.average import Ema
from pipelines.training.engines import (
    deepspeed_config,
    full_weights,
    import_deepspeed,
    learning_rate_at,
    make_engine,
    set_learning_rate,
    update,
)

WORLD = 2
STEPS = 6
DECAY = 0.9
STAGE = TrainedStage(steps=STEPS, batch_size=2, learning_rate=1e-2, grad_clip=0.5)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6))


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(STAGE.batch_size, 6, generator=generator)


def generator_loss(made: Tensor, fake: Tensor, real: Tensor, critic: Any) -> Tensor:
    """DMD's detached gradient and, as a GAN head would have it, one through the critic."""
    shape = (-1, 1, 1, 1, 6)
    gradient = dmd_gradient(made.view(shape), real.view(shape), fake.view(shape))
    return gradient_as_loss(made.view(shape), gradient) + 0.1 * critic(made).square().mean()


def reference() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Generator, critic and generator's average, trained by plain PyTorch on both ranks' data."""
    generator, critic, teacher = network(0), network(1), network(2)
    optimizers = []
    for net in (generator, critic):
        decays = ([p for p in net.parameters() if p.dim() > 1], 0.01)
        others = ([p for p in net.parameters() if p.dim() <= 1], 0.0)
        groups = [{"params": params, "weight_decay": decay} for params, decay in (decays, others)]
        optimizers.append(torch.optim.AdamW(groups, lr=1e-2, betas=STAGE.betas))
    average = copy.deepcopy(generator.state_dict())
    for step in range(STEPS):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, STAGE, 1e-2)
        data = [batch(step, rank) for rank in range(WORLD)]
        if step % 2 == 0:
            losses = []
            for x in data:
                made = generator(x)
                with torch.no_grad():
                    fake, real = critic(made), teacher(made)
                losses.append(generator_loss(made, fake, real, critic))
            _plain_step(generator, optimizers[0], torch.stack(losses).mean())
            decay = min(DECAY, (2 + step // 2) / (11 + step // 2))
            for name, value in generator.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        losses = [(critic(generator(x).detach()) - x).square().mean() for x in data]
        _plain_step(critic, optimizers[1], torch.stack(losses).mean())
    return generator.state_dict(), critic.state_dict(), average


def _plain_step(net: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(net.parameters(), STAGE.grad_clip)
    optimizer.step()


def train(compute: ComputeConfig, folder: Path) -> tuple[Any, Any, Ema]:
    """The same with engines; in the middle everything is saved and loaded into new ones."""
    rank = distributed.get_rank()
    generator = make_engine(network(0), compute, STAGE, 1e-2)
    critic = make_engine(network(1), compute, STAGE, 1e-2)
    ema, teacher = Ema(generator, DECAY), network(2).to(_dtype(compute))
    for step in range(STEPS):
        if step == 3:
            for name, engine in (("generator", generator), ("critic", critic)):
                engine.save_checkpoint(str(folder / name), tag="t", save_latest=False)
            state = copy.deepcopy(ema.state_dict())
            generator = make_engine(network(3), compute, STAGE, 1e-2)
            critic = make_engine(network(4), compute, STAGE, 1e-2)
            ema = Ema(generator, DECAY)
            for name, engine in (("generator", generator), ("critic", critic)):
                engine.load_checkpoint(str(folder / name), tag="t")
            ema.load_state_dict(state)
        for engine in (generator, critic):
            set_learning_rate(engine, learning_rate_at(step, STAGE, 1e-2))
        x = batch(step, rank).to(_dtype(compute))
        if step % 2 == 0:
            made = generator(x)
            with torch.no_grad():
                fake, real = critic.module(made), teacher(made)
            critic.module.requires_grad_(False)
            update(generator, generator_loss(made, fake, real, critic.module))
            critic.module.requires_grad_(True)
            ema.update()
        with torch.no_grad():
            made = generator.module(x)
        update(critic, (critic(made) - x).float().square().mean())
    return generator, critic, ema


def _dtype(compute: ComputeConfig) -> torch.dtype:
    return torch.bfloat16 if compute.precision == "bf16" else torch.float32


def compare(rank: int, folder: Path) -> None:
    """Both checks in one start of the two processes, which costs more than they do."""
    compare_fp32(folder)
    compare_bf16(folder)


def compare_fp32(folder: Path) -> None:
    expected = reference()
    for zero_stage in (0, 1, 2, 3):
        compute = ComputeConfig(zero_stage=zero_stage)
        generator, critic, ema = train(compute, folder / f"zero{zero_stage}")
        raw = full_weights(generator)
        averaged = ema.full_weights()
        found = (raw, full_weights(critic), averaged)
        for name, wanted, got in zip(("generator", "critic", "ema"), expected, found, strict=True):
            for key, value in wanted.items():
                torch.testing.assert_close(
                    got[key], value, atol=2e-6, rtol=1e-5, msg=f"ZeRO-{zero_stage} {name} {key}"
                )
        for key, value in full_weights(generator).items():
            assert torch.equal(value, raw[key]), "gathering the average must not change the network"
        assert full_weights(generator, keep=False) == {}

    import deepspeed.comm

    assert deepspeed.comm.comm.cdb.shm_comm_op is None, "DeepSpeed compiled its CPU kernel"


def compare_bf16(folder: Path) -> None:
    """The average follows the float32 masters, which bf16 weights cannot show."""
    for zero_stage in (1, 2, 3):
        compute = ComputeConfig(zero_stage=zero_stage, precision="bf16")
        generator, _, ema = train(compute, folder / f"bf16-zero{zero_stage}")
        for weights in (full_weights(generator), ema.full_weights()):
            for name, value in weights.items():
                assert value.dtype == torch.float32, name
                assert not torch.equal(value, value.bfloat16().float()), f"{name} is rounded"


def on_two_ranks(function: Callable[[int, Path], None], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    multiprocessing.spawn(_rank, args=(function, folder), nprocs=WORLD)


def _rank(rank: int, function: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    import_deepspeed()
    try:
        function(rank, folder)
    finally:
        distributed.destroy_process_group()
    # Not by way of the interpreter's end: DeepSpeed keeps the process group, whose gloo thread may
    # still have to let go of the last collective's tensors, and aborts where it no longer can.
    os._exit(0)


def test_several_engines_equal_plain_pytorch_at_every_zero_stage(tmp_path: Path) -> None:
    on_two_ranks(compare, tmp_path)


def test_the_cpu_kernel_is_still_switched_off_by_the_name_we_use() -> None:
    """`import_deepspeed` sets an internal flag; if DeepSpeed renames it, minutes of compiling and
    a need for a compiler come back."""
    deepspeed = import_deepspeed()
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"


def test_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    stage = TrainedStage(steps=21, warmup_steps=4, final_learning_rate=0.1)
    rates = [learning_rate_at(step, stage, 1.0) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert rates[12] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    constant = TrainedStage(steps=3, warmup_steps=0)
    assert [learning_rate_at(step, constant, 2.0) for step in range(3)] == [2.0, 2.0, 2.0]


def test_bf16_without_sharding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute\.zero_stage=0 .* set compute\.zero_stage"):
        deepspeed_config(ComputeConfig(precision="bf16", zero_stage=0), STAGE)
