"""What a configuration cannot ask for, as far as it and this machine show by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.config.merge import ConfigError
from pipelines.config.stages import (
    TRAINED_STAGES,
    DistillStage,
    FoundationStage,
    TrainedStage,
    VaeStage,
)

if TYPE_CHECKING:
    from pipelines.config.pipeline import PipelineConfig


def check_config(config: PipelineConfig) -> None:
    """Raise a ConfigError for what cannot work, as far as the configuration alone shows it."""
    model = config.model.resolve()
    data, compute = config.data, config.compute
    chunk = model.stream.chunk_latents
    _at_least("data", data, pairs=1, heldout_pairs=1, samples_per_shard=1, workers=0)
    _at_least("data", data, encode_batch=1)
    _at_least("evaluate", config.evaluate, clips=1, dilate=0)
    _at_least("compute", compute, workers=1, threads_per_worker=1, loader_workers=0)
    _at_least("compute", compute, max_failures=0, keep_checkpoints=1)
    if (data.frames + 3) % 4 or ((data.frames + 3) // 4) % chunk or data.frames < 1:
        below = max(1, (data.frames + 3) // (4 * chunk))
        choices = [4 * chunk * n - 3 for n in (below, below + 1)]
        raise ConfigError(
            f"data.frames={data.frames} is not 4n-3 frames of whole chunks of {chunk} latents; "
            f"use {choices[0]} or {choices[1]}"
        )
    _above_0("compute", compute, "cpus_per_worker")
    if compute.zero_stage not in range(4):
        raise ConfigError(f"compute.zero_stage={compute.zero_stage} does not exist; use 0 to 3")
    if compute.precision == "bf16" and compute.zero_stage == 0:
        raise ConfigError(
            "compute.zero_stage=0 keeps no float32 master weights for compute.precision=bf16; "
            "set compute.zero_stage to 1, 2 or 3, or compute.precision=fp32"
        )
    for name in TRAINED_STAGES:
        stage = getattr(config, name)
        _check_stage(name, stage)
        if data.train is None and stage.steps:
            check_batch(config, name, data.pairs)
    if config.vae.steps:
        _check_vae_crops(config, min(model.stream.height, model.stream.width))
    if model.vae.kind == "wan" and config.vae.steps:
        raise ConfigError(
            f"vae.steps={config.vae.steps}, but preset {config.model.preset} uses Wan's own VAE, "
            "which is not trained; set vae.steps=0"
        )
    if model.vae.kind == "wan" and config.model.start is None:
        raise ConfigError(
            f"model.start=null, but preset {config.model.preset} needs Wan's weights; run "
            "`liveedit import --help`, then set model.start to the model directory it writes"
        )
    if model.text.kind == "umt5" and model.text.path is None and config.model.start is None:
        raise ConfigError(
            "model.text.path=null, but a umt5 text encoder needs a folder of weights and tokenizer"
        )


def _check_stage(name: str, stage: TrainedStage) -> None:
    _at_least(name, stage, steps=0, batch_size=1, grad_accumulation=1, warmup_steps=0)
    _at_least(name, stage, log_every=1, checkpoint_every=1, weight_decay=0, grad_clip=0)
    _above_0(name, stage, "learning_rate")
    _shares(name, stage, "final_learning_rate")
    if not all(0 <= beta < 1 for beta in stage.betas):
        raise ConfigError(f"{name}.betas={list(stage.betas)} must both be from 0 to below 1")
    if isinstance(stage, VaeStage):
        _at_least(name, stage, edge_weight=0, scale_weight=0, latent_noise=0, statistics_clips=1)
        _shares(name, stage, "noise_warmup")
    if isinstance(stage, FoundationStage):  # and the causal stage, which is one
        _above_0(name, stage, "shift")
        _shares(name, stage, "text_dropout", "source_dropout")
    if isinstance(stage, DistillStage):
        _at_least(name, stage, generator_every=1, dmd_weight=0, regression_weight=0)
        _above_0(name, stage, "critic_learning_rate")
        _shares(name, stage, "ema_decay")
        if not 0 <= stage.min_timestep < stage.max_timestep <= 1000:
            raise ConfigError(
                f"{name}.min_timestep={stage.min_timestep:g} and "
                f"{name}.max_timestep={stage.max_timestep:g} must rise between 0 and 1000"
            )


def _check_vae_crops(config: PipelineConfig, side: int) -> None:
    frames, crop = config.vae.clip_frames, config.vae.crop
    if frames % 4 != 1 or frames > config.data.frames:
        raise ConfigError(
            f"vae.clip_frames={frames} must be 4n-3 frames, at most "
            f"data.frames={config.data.frames}"
        )
    if crop is not None and (crop % 8 or not 8 <= crop <= side):
        raise ConfigError(
            f"vae.crop={crop} must be a multiple of 8 pixels, at most {side}; null takes all"
        )


def check_batch(config: PipelineConfig, stage: str, samples: int) -> None:
    """Raise when the workers together ask for more samples at once than the dataset has."""
    workers = config.compute.workers or 2  # null: two, or more on more GPUs
    batch = getattr(config, stage).batch_size
    if workers * batch > samples:
        raise ConfigError(
            f"{stage}.batch_size={batch} on compute.workers={workers} asks for {workers * batch} "
            f"samples at once, and the dataset has {samples}; lower {stage}.batch_size to "
            f"{max(1, samples // workers)} or give more data (data.pairs, data.train)"
        )


def check_machine(config: PipelineConfig) -> None:
    """Raise when this machine lacks what `compute` asks for."""
    import torch

    available = torch.cuda.is_available()
    if config.compute.gpus and not available:
        raise ConfigError("compute.gpus=true, but torch sees no GPU here; set compute.gpus=null")
    on_gpu = available and config.compute.gpus is not False
    if config.compute.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(
            f"compute.precision=bf16, which {torch.cuda.get_device_name()} does not support; "
            "set compute.precision=fp32"
        )


def _at_least(section: str, owner: object, **minima: int) -> None:
    for name, minimum in minima.items():
        value = getattr(owner, name)
        if value is not None and value < minimum:
            raise ConfigError(f"{section}.{name}={value} is too small; use {minimum} or more")


def _above_0(section: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not value > 0:  # nor NaN
            raise ConfigError(f"{section}.{name}={value} is too small; use a number above 0")


def _shares(section: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{section}.{name}={value} is a share; use 0 to 1")
