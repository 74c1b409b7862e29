"""DeepSpeed engines: one a trained network, any ZeRO stage, on GPUs or on CPUs.

A process may hold several engines. The rule that keeps them right: the engine is called for the
network that steps; a network that is only passed through is called as `engine.module` (gradients
that flow through another engine crash ZeRO-1 and 2 and silently corrupt ZeRO-3).
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from infra.runtime.environment import set_default
from pipelines.config.stages import ComputeConfig, TrainedStage

Engine = Any  # deepspeed.DeepSpeedEngine, which is imported late: it takes seconds


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without its shared-memory kernel for CPU collectives.

    That kernel is compiled by the first `initialize` on a CPU (minutes, needs a compiler) and gloo
    serves as well. `__compatible_ops__` is internal, and a test guards it.
    """
    if not torch.cuda.is_available():
        set_default("DS_ACCELERATOR", "cpu")
    set_default("DEEPSPEED_LOG_LEVEL", "warning")
    with _light_imports():
        import deepspeed
        import deepspeed.runtime.zero.muon.original_muon

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _light_imports() -> Iterator[None]:
    """Keep DeepSpeed from importing what nobody here uses, four fifths of the time it takes.

    Its autotuner imports MLflow if it is there, and Muon's kernels are decorated with
    `torch.compile`, which imports the whole compiler; both before any engine exists.
    """
    compile_, mlflow = torch.compile, sys.modules.get("mlflow")
    sys.modules["mlflow"] = mlflow  # type: ignore[assignment]  # None makes its import fail
    torch.compile = lambda function=None, **_: function or (lambda f: f)  # type: ignore
    try:
        yield
    finally:
        torch.compile = compile_
        if mlflow is None:
            del sys.modules["mlflow"]


def make_engine(
    network: nn.Module, compute: ComputeConfig, stage: TrainedStage, learning_rate: float
) -> Engine:
    """An engine that trains all parameters of `network`, which moves to the engine's precision.

    The process group must exist. Every rank must hand in the same weights.
    """
    deepspeed = import_deepspeed()
    network.requires_grad_(True)
    decayed = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]  # biases and norms: no weight decay
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=stage.betas)
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        config=deepspeed_config(compute, stage),
        dist_init_required=False,
    )
    # No layer of ours behaves differently in training mode, and ZeRO-3 records a trace of every
    # forward without gradient that runs in it.
    engine.module.eval()
    return engine


def deepspeed_config(compute: ComputeConfig, stage: TrainedStage) -> dict[str, Any]:
    """The DeepSpeed configuration; everything not named is DeepSpeed's default."""
    if compute.precision == "bf16" and compute.zero_stage == 0:
        raise ValueError(
            "compute.zero_stage=0 keeps no float32 master weights for compute.precision=bf16; "
            "set compute.zero_stage to 1, 2 or 3, or compute.precision=fp32"
        )
    return {
        "train_micro_batch_size_per_gpu": stage.batch_size,
        "gradient_accumulation_steps": stage.grad_accumulation,
        "gradient_clipping": stage.grad_clip,
        "bf16": {"enabled": compute.precision == "bf16"},
        "zero_optimization": {"stage": compute.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # the loop prints
    }


def learning_rate_at(step: int, stage: TrainedStage, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine to `final_learning_rate` times it.

    `step` counts from 0; the first update already moves.
    """
    warmup = min(1.0, (step + 1) / (stage.warmup_steps + 1))
    run = max(0, step - stage.warmup_steps) / max(1, stage.steps - 1 - stage.warmup_steps)
    floor = stage.final_learning_rate
    return peak * warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, run))))


def set_learning_rate(engine: Engine, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def load_engine(engine: Engine, folder: Path, tag: str) -> None:
    """Load `engine` from a checkpoint of DeepSpeed's, tag "universal" on any number of ranks.

    Learning rate, weight decay and betas stay what this engine was made with. A universal
    checkpoint of ZeRO-3 comes with one step counter for all groups, which each would count up.
    """
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in engine.optimizer.param_groups
    ]
    engine._config.load_universal_checkpoint = tag == "universal" and engine.zero_optimization()
    engine.load_checkpoint(str(folder), tag=tag)
    for group, ours in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(ours)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in inner.state.values():
        state["step"] = state["step"].clone()


def update(engine: Engine, loss: Tensor) -> Tensor | None:
    """One backward pass and, after the last of an accumulation, the optimizer's step.

    Returns the gradient norm before clipping if the optimizer stepped.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    engine.backward(loss)
    engine.step()
    if not boundary:
        return None
    norm = engine.get_global_grad_norm()
    return torch.as_tensor(norm if norm is not None else 0.0, device=loss.device).float()


def master_shards(engine: Engine) -> dict[str, Tensor]:
    """This rank's float32 part of every parameter, as flat views of what the optimizer steps.

    A parameter of which this rank holds nothing is left out.
    """
    shards: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):  # ZeRO-3
            shards[name] = parameter._z3_optimizer.get_local_fp32_param(parameter).detach()
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
            if parameter._hp_mapping is not None:
                shards[name] = parameter._hp_mapping.get_hp_fragment().detach()
        else:
            assert parameter.dtype == torch.float32, "ZeRO-0 trains in float32 only"
            shards[name] = parameter.detach().view(-1)
    return shards


def shard_starts(engine: Engine) -> dict[str, int]:
    """Where in its flat parameter each of `master_shards` begins."""
    starts: dict[str, int] = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            starts[name] = distributed.get_rank() * parameter.ds_tensor.numel()
        elif getattr(parameter, "_hp_mapping", None) is not None:
            starts[name] = parameter._hp_mapping.lp_fragment_address.start
        elif not hasattr(parameter, "_hp_mapping"):
            starts[name] = 0
    return starts


def full_weights(engine: Engine, keep: bool = True) -> dict[str, Tensor]:
    """All weights of the engine's network, whole and in float32 on the CPU; a collective.

    A rank that does not `keep` them takes part and gets an empty dict.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        full = parameter.detach() if full is None else full
        if keep:
            weights[name] = full.to("cpu", torch.float32, copy=True)
    return weights
