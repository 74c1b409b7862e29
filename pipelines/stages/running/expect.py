"""What a stage will take, as far as that can be told before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from modeling.config import ModelConfig
from modeling.diffusion.lora import adapt
from modeling.diffusion.transformer import Transformer
from modeling.vae.build import build_vae
from pipelines.config.stages import ComputeConfig
from pipelines.tracking.records import StageRecord

GIB = 2**30
_ADAM = 8  # bytes a parameter
_MASTER = 4


def workers_of(compute: ComputeConfig) -> int | None:
    """Workers of a training; None if the cluster that says so is elsewhere."""
    if compute.workers is not None:
        return compute.workers
    if compute.address is not None:
        return None
    gpus = torch.cuda.device_count() if compute.gpus is not False else 0
    return gpus or 2


def seconds_from(record: StageRecord | None, work: float, before: float) -> float | None:
    """By how long the stage took when it last ran here and did `before` instead of `work`, in any
    unit; None if it never did."""
    return record.seconds * work / before if record and before > 0 else None


def clips_trained(section: Mapping[str, Any], steps: int | None = None) -> float:
    """A worker's, in all steps or so many."""
    batch = section.get("batch_size", 1) * section.get("grad_accumulation", 1)
    return float((section.get("steps", 0) if steps is None else steps) * batch)


def parameters(stage: str, section: Any, model: ModelConfig) -> tuple[int, int]:
    """How many parameters the stage's own network has, and how many of them are trained."""
    with torch.device("meta"):
        network: nn.Module = (
            build_vae(model.vae) if stage == "vae" else Transformer(model.transformer)
        )
    if getattr(section, "lora_rank", 0):
        adapt(network, section.lora_rank, section.lora_alpha, section.lora_targets)
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def states_gib(
    stage: str, section: Any, model: ModelConfig, compute: ComputeConfig, workers: int
) -> float:
    """What weights, gradients, optimizer and averages take of a worker's memory. A distill stage
    that matches distributions (dmd_weight above 0) has a teacher and a critic.

    Counted, not measured: activations and buffers come on top. DeepSpeed keeps bf16 weights and
    gradients beside float32 masters and Adam's two moments; ZeRO 1 shards the last, 2 the gradients
    too, 3 all, and the teacher. A teacher of another size is counted as one of this.
    """
    count, trained_count = parameters(stage, section, model)
    size = 2 if compute.precision == "bf16" else 4
    zero = compute.zero_stage
    weights = size / (workers if zero == 3 else 1)
    gradients = size / (workers if zero >= 2 else 1)
    optimizer = (_ADAM + _MASTER) / workers if zero else _ADAM
    trained = weights + gradients + optimizer
    if stage != "distill":
        return (count * weights + trained_count * (gradients + optimizer)) / GIB
    average = _MASTER / (workers if zero else 1)
    scores = trained + weights if section.dmd_weight > 0 else 0  # critic and teacher
    return count * (trained + average + scores) / GIB
