"""A training job: the one value that goes from the pipeline to every worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.manifest import DatasetInfo, dataset_hash, read_dataset_info
from modeling.detail.work_size import in_words
from modeling.fingerprint import model_fingerprint
from modeling.model_dir import read_card
from pipelines.config.load import section_plain
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.rules import training_key
from pipelines.tracking.tracker import code_commit
from pipelines.training.taught import taught


@dataclass(frozen=True)
class Job:
    """`stage` as `config` says; paths are absolute, because each worker has a folder of its own."""

    stage: str
    config: PipelineConfig
    start: Path  # model directory
    dataset: str  # pairs (vae) or encoded pairs (all others)
    output: Path  # where the model directory goes
    folder: Path  # of checkpoints, see `RunFolder`
    models: Mapping[str, Path] = field(default_factory=dict)  # further ones: distill's "teacher"
    heldout: str | None = None  # pairs to validate on
    card: Mapping[str, Any] = field(default_factory=dict)  # of the model: where it comes from


def make_job(
    stage: str,
    config: PipelineConfig,
    *,
    start: Path,
    dataset: str,
    output: Path,
    models: Mapping[str, Path] | None = None,
    heldout: str | None = None,
    key: str | None = None,
    same: str | None = None,
) -> Job:
    """See `Job`; its folder is named by what a training must have in common with one that it goes
    on from: start, data, teacher, losses and draws.

    Args:
        key: The hash of everything that decides the result, if the caller has it.
        same: The `training_key`, if the caller has it.
    """
    info = read_dataset_info(dataset)
    parent, data = model_fingerprint(start), dataset_hash(info)
    section, models = section_plain(getattr(config, stage)), models or {}
    card = {
        "stage": stage,
        "key": key,
        "parent": {"path": str(start), "fingerprint": parent},
        "dataset": {"uri": dataset, "hash": data},
        "teacher": str(models["teacher"]) if "teacher" in models else None,
        **taught(read_card(start), info),
        "config": section,
        "compute": section_plain(config.compute),
        "seed": config.seed,
        "trained_at": trained_at(read_card(start), stage, info),
    }
    same = same or training_key(
        stage, section, seed=config.seed, start=parent, dataset=data, teacher=card["teacher"]
    )
    return Job(
        stage=stage,
        config=config,
        start=Path(start).absolute(),
        dataset=_absolute(dataset),
        output=Path(output).absolute(),
        folder=Path(config.output).absolute() / "checkpoints" / f"{stage}-{same[:12]}",
        models={name: Path(path).absolute() for name, path in models.items()},
        heldout=_absolute(heldout) if heldout else None,
        card={**card, "same": same, "commit": code_commit()},
    )


def trained_at(card: dict[str, Any], stage: str, info: DatasetInfo) -> list[str]:
    """Sizes that a model's transformer has seen after this stage, WIDTHxHEIGHT, the newest last."""
    before: list[str] = card.get("trained_at", [])
    if stage == "vae":
        return before
    here = in_words((info.height, info.width))
    return [*(size for size in before if size != here), here]


def _absolute(dataset: str) -> str:
    return dataset if "://" in dataset else str(Path(dataset).absolute())
