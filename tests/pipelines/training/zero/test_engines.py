"""DeepSpeed as the stages use it, on two gloo ranks against one process without DeepSpeed.

These guard upgrades: several engines in a process, gradients that pass through another network,
float32 masters and their average are where DeepSpeed has been wrong without an error.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from modeling.diffusion.lora import adapt
from modeling.losses.dmd import dmd_gradient, gradient_as_loss
from pipelines.config.stages import ComputeConfig, TrainedStage
from pipelines.training.run_folder import RunFolder
from pipelines.training.saver import Saver
from pipelines.training.zero import inside
from pipelines.training.zero.average import Ema
from pipelines.training.zero.engines import (
    deepspeed_config,
    learning_rate_at,
    make_engine,
    set_learning_rate,
    update,
)
from pipelines.training.zero.inside import (
    copy_weights,
    full_weights,
    import_deepspeed,
    load_engine,
    make_universal,
    save_engine,
    shard,
    shard_frozen,
)
from tests.pipelines.training.plain import setting
from tests.pipelines.training.ranks import on_ranks

WORLD = 2
STEPS = 6
DECAY = 0.9
OFFLOADED: Any = (
    *((0, "nothing"), (1, "optimizer"), (2, "nothing")),
    *((3, "nothing"), (3, "weights")),
)
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
    """The same with engines; in the middle everything is saved for the second time, as a training
    saves it, and loaded into new ones."""
    rank = distributed.get_rank()
    saver = Saver(setting("distill"), RunFolder(folder), cast(Any, None), lambda write, step: None)
    generator = make_engine(network(0), compute, STAGE, 1e-2)
    critic = make_engine(network(1), compute, STAGE, 1e-2)
    ema, teacher = Ema(generator, DECAY), network(2).to(_dtype(compute))
    if compute.zero_stage == 3:
        teacher = shard_frozen(teacher, deepspeed_config(compute, STAGE))
        assert all(parameter.numel() == 0 for parameter in teacher.parameters())
    for step in range(STEPS):
        if step in (2, 3):
            states: dict[str, Any] = {}

            def collect(state_dict: Any, path: str, states: dict[str, Any] = states) -> None:
                states[path] = saver.copy(state_dict)

            for name, engine in (("generator", generator), ("critic", critic)):
                save_engine(engine, folder / name, "t", collect)
            state = saver.copy(ema.state_dict())
        if step == 3:
            for path, value in states.items():
                torch.save(value, path)
            distributed.barrier()
            generator = make_engine(network(3), compute, STAGE, 1e-2)
            critic = make_engine(network(4), compute, STAGE, 1e-2)
            ema = Ema(generator, DECAY)
            for name, engine in (("generator", generator), ("critic", critic)):
                load_engine(engine, folder / name, "t")
            ema.load_state_dicts([state])
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
    """All checks in one start of the two processes, which costs more than they do."""
    keep_linear(rank)
    take_shares(rank)
    gather_whole()
    compare_fp32(folder)
    compare_bf16(folder)
    compare_adapters(folder)


def keep_linear(rank: int) -> None:
    """Where blocks are recomputed, ZeRO-3 leaves PyTorch's `linear` to all networks."""
    compute = ComputeConfig(zero_stage=3, activation_checkpointing=True)
    assert compute.activation_checkpointing != ComputeConfig().activation_checkpointing
    before = nn.functional.linear
    engine = make_engine(network(0), compute, STAGE, 1e-2)
    shard_frozen(network(2), deepspeed_config(compute, STAGE))
    assert nn.functional.linear is before
    weights = full_weights(engine)
    update(engine, engine(batch(0, rank)).square().mean())
    assert not torch.equal(full_weights(engine)["0.weight"], weights["0.weight"])


def take_shares(rank: int) -> None:
    """Each rank takes its part of a network from its own memory; none is sent, or ever whole on
    the device: 28 GB a network of 14 B parameters."""
    import deepspeed.comm

    comm: Any = deepspeed.comm
    sent: list[object] = []
    before, whole, net = comm.broadcast, network(2), network(2)
    comm.broadcast = lambda *given, **named: sent.append(given)
    try:
        shard(net, deepspeed_config(ComputeConfig(zero_stage=3), STAGE))
    finally:
        comm.broadcast = before
    assert sent == []
    for mine, parameter in zip(net.parameters(), whole.parameters(), strict=True):
        part: Any = mine
        shares = parameter.detach().flatten().chunk(WORLD)
        assert mine.numel() == 0
        assert torch.equal(part.ds_tensor, shares[rank])


def gather_whole() -> None:
    """Also where a network has more parameters than are gathered at once."""
    engine, target = make_engine(network(2), ComputeConfig(zero_stage=3), STAGE, 1e-2), network(3)
    together, inside._GATHERED = inside._GATHERED, 3
    try:
        copy_weights(engine, target)
    finally:
        inside._GATHERED = together
    for name, value in network(2).state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def compare_fp32(folder: Path) -> None:
    expected = reference()
    for zero_stage, offload in OFFLOADED:
        compute = ComputeConfig(zero_stage=zero_stage, offload=offload)
        generator, critic, ema = train(compute, folder / f"zero{zero_stage}{offload}")
        if offload != "nothing":
            assert generator.zero_use_cpu_optimizer()
            assert (generator.zero_offload_param() is not None) == (offload == "weights")
        raw = full_weights(generator)
        averaged = ema.full_weights()
        found = (raw, full_weights(critic), averaged)
        for name, wanted, got in zip(("generator", "critic", "ema"), expected, found, strict=True):
            for key, value in wanted.items():
                torch.testing.assert_close(
                    got[key],
                    value,
                    atol=2e-6,
                    rtol=1e-5,
                    msg=f"ZeRO-{zero_stage}, {offload}: {name} {key}",
                )
        for key, value in full_weights(generator).items():
            assert torch.equal(value, raw[key]), "gathering the average must not change the network"
        assert full_weights(generator, keep=False) == {}

    import deepspeed.comm

    assert deepspeed.comm.comm.cdb.shm_comm_op is None, "DeepSpeed compiled its CPU kernel"


def compare_bf16(folder: Path) -> None:
    """The average follows the float32 masters, which bf16 weights cannot show."""
    for zero_stage in (1, 2, 3):
        offload: Any = "optimizer" if zero_stage == 2 else "nothing"
        compute = ComputeConfig(zero_stage=zero_stage, precision="bf16", offload=offload)
        generator, _, ema = train(compute, folder / f"bf16-zero{zero_stage}")
        for weights in (full_weights(generator), ema.full_weights()):
            for name, value in weights.items():
                assert value.dtype == torch.float32, name
                assert not torch.equal(value, value.bfloat16().float()), f"{name} is rounded"
        # One rank's broken batch shows in the norm of all, which is what ends such a training.
        broken = batch(0, distributed.get_rank()).bfloat16()
        broken[0, 0] *= float("nan") if distributed.get_rank() == 1 else 1
        norm = update(generator, generator(broken).square().mean())
        assert norm is not None
        assert not torch.isfinite(norm)


def adapted(seed: int) -> nn.Module:
    net = network(seed)
    adapt(net, 2, 4.0, ("0", "2"))
    return net


def compare_adapters(folder: Path) -> None:
    """With frozen weights beside what is trained; saved and loaded in the middle, also into another
    ZeRO stage."""
    plain = adapted(0)
    optimizer = torch.optim.AdamW((p for p in plain.parameters() if p.requires_grad), lr=1e-2)
    for step in range(STEPS):
        loss = torch.stack([plain(batch(step, r)).square().mean() for r in range(WORLD)]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), STAGE.grad_clip)
        optimizer.step()
    wanted = {name: p.detach() for name, p in plain.named_parameters() if p.requires_grad}
    assert len(wanted) == 4
    for before, after in ((2, 2), (2, 3), (3, 3), (3, 2), (0, 2), (0, 3), (1, 0), (3, 0)):
        compute, place = ComputeConfig(zero_stage=before), folder / f"lora{before}{after}"
        tag = "t" if before == after else "universal"
        engine = make_engine(adapted(0), compute, STAGE, 1e-2, whole=False)
        for step in range(STEPS):
            if step == 3:
                engine.save_checkpoint(str(place), tag="t", save_latest=False)
                distributed.barrier()
                if tag == "universal" and distributed.get_rank() == 0:
                    trained = [n for n, p in engine.module.named_parameters() if p.requires_grad]
                    make_universal(place / "t", place / tag, after, WORLD, trained)
                distributed.barrier()
                compute = ComputeConfig(zero_stage=after)
                engine = make_engine(adapted(0), compute, STAGE, 1e-2, whole=False)
                load_engine(engine, place, tag)
            update(engine, engine(batch(step, distributed.get_rank())).square().mean())
        found = full_weights(engine)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            message = f"ZeRO-{before}, then {after}: {name}"
            torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-5, msg=message)


def test_several_engines_equal_plain_pytorch_at_every_zero_stage(tmp_path: Path) -> None:
    on_ranks(WORLD, compare, tmp_path)


def test_the_cpu_kernel_is_still_switched_off_by_the_name_we_use() -> None:
    """`import_deepspeed` sets an internal flag; if DeepSpeed renames it, minutes of compiling and
    a need for a compiler come back."""
    deepspeed = import_deepspeed()
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
