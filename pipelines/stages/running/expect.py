"""What a stage will take, as far as that can be told before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from modeling.config import ModelConfig, TransformerConfig, VaeConfig
from modeling.diffusion.attention import bidirectional
from modeling.diffusion.lora import adapt
from modeling.diffusion.transformer import Transformer
from modeling.geometry import SPATIAL_STRIDE, latents_of
from modeling.vae.build import build_vae
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig
from pipelines.tracking.records import StageRecord
from pipelines.training.watch.speed import peak_of

GIB = 2**30
_MOMENT = 4  # bytes a parameter
_MASTER = 4
# Of model FLOPs over a card's dense bf16 peak, as measured on H100s and H200s: docs/training.md.
MFU = 0.36
DETERMINISTIC_MFU = 0.25
_BLOCK_ROWS, _FFN_ROWS = 10, 3  # numbers that a block's backward pass keeps, in rows of its sizes
_PRODUCT_ROWS = 6  # of q k v o, and the text's q o
_BUFFERS = 1e9  # numbers in DeepSpeed's buckets for reducing and gathering


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
    sizes = model.vae if stage == "vae" else model.transformer
    rank = getattr(section, "lora_rank", 0)
    return _counted(sizes, rank, tuple(section.lora_targets) if rank else ())


@cache  # a plan asks three times a stage, and building a network takes longer than all the rest
def _counted(
    sizes: TransformerConfig | VaeConfig, rank: int, targets: tuple[str, ...]
) -> tuple[int, int]:
    with torch.device("meta"):
        network: nn.Module = (
            build_vae(sizes) if isinstance(sizes, VaeConfig) else Transformer(sizes)
        )
    if rank:
        adapt(network, rank, 1.0, targets)  # its scale is no parameter
    counts = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(size for size, _ in counts), sum(size for size, trained in counts if trained)


@dataclass(frozen=True)
class States:
    """GiB of a worker, in its GPU's (without GPUs: its) and in the host's memory."""

    device: float
    host: float = 0.0


def states_gib(
    stage: str, section: Any, model: ModelConfig, compute: ComputeConfig, workers: int
) -> States:
    """What weights, gradients, optimizer and averages take of a worker's memory. A distill stage
    that matches distributions (dmd_weight above 0) has a teacher and a critic.

    Counted, not measured: activations and buffers come on top. DeepSpeed keeps bf16 weights and
    gradients beside float32 masters and Adam's two moments (one where its first beta is 0, as in
    distill); ZeRO 1 shards the last, 2 the gradients too, 3 all, and the teacher. Where the
    optimizer is offloaded, its gradients are summed up in float32 on the host. A teacher of another
    size is counted as one of this.
    """
    count, trained_count = parameters(stage, section, model)
    size = 2 if compute.precision == "bf16" else 4
    zero, offload = compute.zero_stage, compute.offload
    weights = size / (workers if zero == 3 else 1)
    gradients = size / (workers if zero >= 2 else 1)
    adam = _MOMENT * (2 if section.betas[0] else 1)  # see `zero.adam`
    optimizer = (adam + _MASTER) / workers if zero else adam
    average = _MASTER / (workers if zero else 1)
    hosted = 0.0  # of what is trained
    if offload != "nothing":
        hosted, optimizer = optimizer + _MASTER / workers, 0.0
        hosted += gradients if zero == 3 else 0.0  # each passes through a buffer of its own
        gradients = 0.0 if zero >= 2 else gradients
    trained, frozen = gradients + optimizer, weights
    if stage != "distill":
        device, host = trained_count * trained, trained_count * hosted
        networks = count
    else:
        trainers = 2 if section.dmd_weight > 0 else 1  # generator and critic
        networks = count * (2 * trainers - 1)  # and teacher
        device, host = count * trainers * trained, count * trainers * hosted
        if zero == 3 and section.rollout_copy:  # whole
            device += count * size
        device += count * average * (offload == "nothing")
        host += count * average * (offload != "nothing")
    if offload == "weights":
        host += networks * frozen
    else:
        device += networks * frozen
    return States(device / GIB, host / GIB)


def counted_seconds(
    stage: str, config: PipelineConfig, steps: int, card: str | None
) -> float | None:
    """Of so many steps by arithmetic: the model FLOPs of a step over `mfu` of the card's peak.

    None for a card whose peak is not known, for the vae and for a method that is not the stage's
    own. Start, validation and saving come on top.
    """
    peak = peak_of(card) if card else None
    flops = step_flops(stage, config)
    if peak is None or flops is None:
        return None
    return steps * flops / (mfu(config.compute) * peak * 1e12)


def mfu(compute: ComputeConfig) -> float:
    """What a step reaches by what was measured, see docs/training.md."""
    return DETERMINISTIC_MFU if compute.deterministic else MFU


def step_flops(stage: str, config: PipelineConfig) -> float | None:
    """A worker's model FLOPs in a step, on average; a teacher of another size counts as one of this
    model's."""
    from pipelines.training.methods import causal, distill, foundation

    section, model = getattr(config, stage), config.model.resolve()
    if stage == "vae" or section.method not in (None, stage):
        return None
    size, stream = model.transformer, model.stream
    clip = latents_shape(config, section.batch_size)
    if stage == "foundation":
        flops = foundation.step_flops(size, bidirectional(clip[1]), clip)
    elif stage == "causal":
        visible = causal.visibility(section, stream, clip[1])
        flops = foundation.step_flops(size, visible, clip)
    else:
        if not section.mask_cache:
            stream = replace(stream, mask_cache=None)
        places = range(len(stream.timesteps))  # a rollout ends at each of them as often
        count = partial(distill.step_flops, section, size, size, stream, clip)
        steps = range(section.generator_every)
        flops = sum(count(step, last) for step in steps for last in places)
        flops /= len(steps) * len(places)
    return flops * section.grad_accumulation / config.compute.sharing(stage)


def latents_shape(config: PipelineConfig, clips: int) -> tuple[int, int, int, int, int]:
    """[B, F, C, h, w] of a batch."""
    stream, size = config.model.resolve().stream, config.model.resolve().transformer
    cells = (stream.height // SPATIAL_STRIDE, stream.width // SPATIAL_STRIDE)
    return (clips, latents_of(config.data.frames), size.latent_channels, *cells)


def activations_gib(stage: str, config: PipelineConfig) -> float | None:
    """What a worker's largest backward pass keeps beside the states, and DeepSpeed's buffers.

    With recomputed blocks: every block's input, the results that are kept unless those are
    recomputed too (`diffusion.recompute`), and all of one block; without: all of every block.
    Distill also holds a rollout's history, and the stream's cache that it runs on, which workers
    that share a clip each have whole. None for the vae.
    """
    section, compute = getattr(config, stage), config.compute
    if stage == "vae":
        return None
    size, stream = config.model.resolve().transformer, config.model.resolve().stream
    clips, frames, _, height, width = latents_shape(config, section.batch_size)
    latent = clips * height * width // 4 * size.dim  # numbers in a token's row, of one latent
    block = _BLOCK_ROWS + _FFN_ROWS * size.ffn_dim / size.dim  # rows that a block keeps
    kept = float(block)
    if compute.activation_checkpointing:
        kept = 1.0 if compute.recompute_attention else 3.0
        if kept > 1:
            share = getattr(section, "keep_products", 0) / size.num_layers
            kept += _PRODUCT_ROWS * min(1.0, share)
    seen = frames if stage != "causal" else 2 * frames
    alone = 0.0
    rows = seen * (kept * size.num_layers + block * compute.activation_checkpointing)
    if stage == "distill":  # keys and values
        rows += 2 * size.num_layers * (frames - stream.chunk_latents)
        alone = 2 * size.num_layers * stream.window_latents / clips  # clip by clip
    number = 2 if compute.precision == "bf16" else 4
    weights, _ = parameters(stage, section, config.model.resolve())
    buffers = min(_BUFFERS, weights) * number * (compute.zero_stage > 0)
    shared = rows / compute.sharing(stage)
    return (latent * (shared + alone) * number + buffers) / GIB
