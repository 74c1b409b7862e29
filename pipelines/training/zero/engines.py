"""DeepSpeed engines: one a trained network, any ZeRO stage, on GPUs or on CPUs.

A process may hold several engines. The rule that keeps them right: the engine is called for the
network that steps; a network that is only passed through is called as `engine.module` (gradients
that flow through another engine crash ZeRO-1 and 2 and silently corrupt ZeRO-3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from modeling.diffusion.transformer import Block
from pipelines.config.stages import ComputeConfig, TrainedStage
from pipelines.training.zero.adam import without_first_moment
from pipelines.training.zero.inside import ZeroEngine, import_deepspeed, shard


def gather_by_block(network: nn.Module, compute: ComputeConfig) -> None:
    """Let ZeRO-3 gather a transformer block's weights together, not those of each of its dozen
    layers in turn. Call it before `make_engine`.

    Only for a network that runs once a backward pass: DeepSpeed takes a block's gradients when the
    block is done, and would take those of a second run again.
    """
    if compute.zero_stage == 3:
        import_deepspeed().utils.set_z3_leaf_modules(network, [Block])


def make_engine(
    network: nn.Module,
    compute: ComputeConfig,
    stage: TrainedStage,
    learning_rate: float,
    whole: bool = True,
) -> ZeroEngine:
    """An engine that trains all parameters of `network`, or where not `whole` those that already
    ask for gradients; it moves to the engine's precision.

    The process group must exist. Every rank must hand in the same weights.
    """
    deepspeed = import_deepspeed()
    if whole:
        network.requires_grad_(True)
    trained = [p for p in network.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1]
    others = [p for p in trained if p.dim() <= 1]  # biases and norms: no weight decay
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    config = deepspeed_config(compute, stage)
    if is_sharded(compute):
        shard(network.to(torch.bfloat16 if compute.precision == "bf16" else torch.float32), config)
    # Fused, the step needs no memory of its own; otherwise twice the weights in float32. On a CPU,
    # where an offloaded optimizer steps, it is faster too.
    fused = next(network.parameters()).is_cuda or compute.offload != "nothing"
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=stage.betas, fused=fused)
    if stage.betas[0] == 0:
        without_first_moment(optimizer)
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        config=config,
        dist_init_required=False,
    )
    # No layer of ours behaves differently in training mode, and ZeRO-3 records a trace of every
    # forward without gradient that runs in it.
    engine.module.eval()
    return engine


def is_sharded(compute: ComputeConfig) -> bool:
    """Whether no rank holds whole weights; networks then come from the host's memory."""
    return compute.zero_stage == 3


def deepspeed_config(compute: ComputeConfig, stage: TrainedStage) -> dict[str, Any]:
    """The DeepSpeed configuration; everything not named is DeepSpeed's default."""
    zero: dict[str, Any] = {"stage": compute.zero_stage}
    if compute.zero_stage == 3:
        # DeepSpeed's own `linear` takes the place of PyTorch's in the whole process, also under
        # networks that nobody shards, and adds biases in a pass of their own. It keeps no whole
        # weight for the backward pass, and neither does a block that is recomputed.
        zero["memory_efficient_linear"] = not compute.activation_checkpointing
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if compute.offload != "nothing":
        zero["offload_optimizer"] = host
    if compute.offload == "weights":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": stage.batch_size,
        "gradient_accumulation_steps": stage.grad_accumulation,
        "gradient_clipping": stage.grad_clip,
        # A gradient that is not finite shows in the norm, and the meter ends the training for it;
        # to look at every parameter's, too, is thousands of launches a step.
        "bf16": {"enabled": compute.precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own on a CPU needs a compiler
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


def set_learning_rate(engine: ZeroEngine, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def update(engine: ZeroEngine, loss: Tensor) -> Tensor | None:
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
