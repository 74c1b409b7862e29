"""All that can be known to fail is found before anything starts."""

from __future__ import annotations

from pathlib import Path

from data.manifest import DatasetInfo, read_dataset_info
from infra.runtime.ray import check_address
from pipelines.config.check import check_batch, check_machine
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import TRAINED_STAGES
from pipelines.stages.start import start_source
from pipelines.tracking.tracker import check_reachable


def check(config: PipelineConfig) -> Path | None:
    """Raise a ValueError for what cannot work; returns the model directory to start from."""
    assert config.tracking.uri is not None
    check_machine(config)
    if config.compute.address is not None:
        check_address(config.compute.address, "compute.address")
    start = start_source(config)
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
                    check_batch(config, stage, info.samples)
    check_reachable(config.tracking.uri)  # last: it may make a database
    return start


def _check_clips(where: str, info: DatasetInfo, chunk: int) -> None:
    if info.kind != "pairs":
        raise ConfigError(f"{where} holds {info.kind} samples; give a dataset of pairs")
    latents, rest = divmod(info.frames + 3, 4)
    if rest or latents % chunk or info.height % 16 or info.width % 16:
        raise ConfigError(
            f"{where} holds clips of {info.frames} frames at {info.height}x{info.width}; training "
            f"needs 4n-3 frames with n a multiple of {chunk}, and sizes that are multiples of 16: "
            "ingest it again with such a size"
        )
