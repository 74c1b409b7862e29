"""All that can be known to fail is found before anything starts."""

from __future__ import annotations

from pathlib import Path

import torch

from data.footage.material import HELDOUT_LIST, SPLITS, names_by_split
from data.manifest import DatasetInfo, read_dataset_info
from infra.runtime.paths import find_path
from infra.runtime.ray import check_address
from modeling.geometry import TOKEN_PIXELS, frames_of, latents_of
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import TRAINED_STAGES
from pipelines.stages.start import start_source, teacher_source
from pipelines.tracking.tracker import check_artifacts, check_store
from pipelines.training.methods.table import METHODS


def check(config: PipelineConfig, *, writes: bool = True) -> Path | None:
    """Raise a UserError for what cannot work; returns the model directory to start from.

    A database of MLflow's on this disk is made if it is not there and this `writes`.
    """
    assert config.tracking.uri is not None
    _check_machine(config)
    if config.compute.address is not None:
        check_address(config.compute.address, "compute.address")
    for stage in TRAINED_STAGES:
        _check_method(stage, getattr(config, stage).method or stage)
    start = start_source(config)
    teacher_source(config)
    chunk = config.model.resolve().stream.chunk_latents
    for key in ("train", "heldout"):
        uri = getattr(config.data, key)
        if uri is None:
            continue
        info = read_dataset_info(uri)
        _check_clips(f"data.{key}={uri}", info, chunk)
        if key == "train":
            for stage in TRAINED_STAGES:
                if getattr(config, stage).steps:
                    config.check_batch(stage, info.samples)
    if config.data.footage is not None:
        _check_footage(config.data.footage, config)
    if writes:  # a plan asks nobody
        check_artifacts(config.tracking.uri, config.tracking.experiment)
    check_store(config.tracking.uri, writes=writes)  # last: it may make a database
    return start


def _check_clips(where: str, info: DatasetInfo, chunk: int) -> None:
    if info.kind != "pairs":
        raise ConfigError(f"{where} holds {info.kind} samples; give a dataset of pairs")
    latents = latents_of(info.frames)
    whole = info.frames == frames_of(latents) and latents % chunk == 0
    if not whole or info.height % TOKEN_PIXELS or info.width % TOKEN_PIXELS:
        raise ConfigError(
            f"{where} holds clips of {info.frames} frames at {info.width}x{info.height}; training "
            f"needs 4n-3 frames with n a multiple of {chunk}, and sizes that are multiples of "
            f"{TOKEN_PIXELS}: ingest it again with such a size"
        )


def _check_method(stage: str, method: str) -> None:
    try:
        METHODS[method]
    except ValueError as error:
        raise ConfigError(f"{stage}.method: {error}") from error


def _check_footage(folder: str, config: PipelineConfig) -> None:
    names = names_by_split(find_path(folder))
    for split in SPLITS:
        if getattr(config.data, split) is None and not names[split]:
            raise ConfigError(
                f"data.footage={folder} holds no photo or clip for the {split} split; add files, "
                f"or say in its {HELDOUT_LIST} which are held out"
            )


def _check_machine(config: PipelineConfig) -> None:
    """Raise when this machine lacks what `compute` asks for."""
    available = torch.cuda.is_available()
    if config.compute.gpus and not available:
        raise ConfigError("compute.gpus=true, but torch sees no GPU here; set compute.gpus=null")
    on_gpu = available and config.compute.gpus is not False
    if config.compute.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(
            f"compute.precision=bf16, which {torch.cuda.get_device_name()} does not support; "
            "set compute.precision=fp32"
        )
