"""How a worker computes: threads, the same bits in every run, and which kernel attends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from infra.runtime.environment import set_default, variable
from pipelines.training.methods.base import Setting

_REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def stepping(setting: Setting) -> Iterator[None]:
    """Which kernel attends in a step on a GPU: cuDNN's, or where `compute.deterministic` asks for
    the same bits in every run others, since the gradient of cuDNN's differs from run to run."""
    if setting.device.type != "cuda":
        yield
    elif setting.config.compute.deterministic:
        # Only while to vary is an error and no mere warning, the gradient of flash attention does
        # not. A VAE attends to nothing, and may have layers that know no other way.
        torch.use_deterministic_algorithms(True, warn_only=setting.stage == "vae")
        with sdpa_kernel(_REPEATABLE):
            yield
        torch.use_deterministic_algorithms(True, warn_only=True)
    else:
        from modeling.gpu.transformer import fast_attention

        with fast_attention():
            yield


def prepare(setting: Setting) -> None:
    compute = setting.config.compute
    if setting.device.type == "cpu":
        torch.set_num_threads(compute.threads_per_worker)
    elif compute.offload != "nothing":  # optimizers step here, and Ray leaves a worker one thread
        beside = int(variable("LOCAL_WORLD_SIZE") or setting.world_size)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))
    if setting.device.type == "cuda" and compute.deterministic:
        set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Or every torch.empty is filled, DeepSpeed's buckets of gigabytes at every step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(setting.seed)
