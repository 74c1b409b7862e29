"""Checkpoints of a stage in mid-training: everything that an exact continuation needs.

Each rank writes its own part (its shards of every engine's optimizer and master weights, of the
EMA, its place in the data) and Ray merges the parts into one folder. There is no random state to
keep: see `stages.base.Draw`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from pipelines.training.methods.base import Setting, Stage

_TAG = "state"  # DeepSpeed's name for the subfolder of an engine


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message says what to do."""


def save(folder: Path, setting: Setting, stage: Stage, step: int, loader: dict[str, Any]) -> None:
    """Write this rank's part of the state after `step` steps into `folder`; a collective."""
    try:
        for name, engine in stage.engines.items():
            engine.save_checkpoint(str(folder / name), tag=_TAG, save_latest=False)
        state = {
            "step": step,
            "loader": loader,
            "ema": stage.ema.state_dict() if stage.ema else None,
            "layout": _layout(setting, stage),
        }
        with (folder / f"worker-{setting.rank}.pt").open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise writing_failed(error, folder, setting.stage, step) from error


def load(folder: Path, setting: Setting, stage: Stage) -> tuple[int, dict[str, Any]]:
    """Restore `stage` from a merged checkpoint; returns steps done and the loader's state."""
    file = folder / f"worker-{setting.rank}.pt"
    layout = _layout(setting, stage)
    if not file.is_file():
        found = len(list(folder.glob("worker-*.pt")))
        raise CheckpointError(
            f"the checkpoint of stage {setting.stage} was written by {found} workers and cannot "
            f"go on with {setting.world_size}; set compute.workers={found}, or delete "
            f"{folder.parent} to start the stage again"
        )
    state = torch.load(file, map_location=setting.device, weights_only=True)
    different = [
        f"{name} was {state['layout'][name]!r} and is {value!r}"
        for name, value in layout.items()
        if state["layout"][name] != value
    ]
    if different:
        raise CheckpointError(
            f"the checkpoint of stage {setting.stage} does not fit: {'; '.join(different)}; set it "
            f"back, or delete {folder.parent} to start the stage again"
        )
    for name, engine in stage.engines.items():
        engine.load_checkpoint(str(folder / name), tag=_TAG)
    if stage.ema:
        stage.ema.load_state_dict(state["ema"])
    return state["step"], state["loader"]


def writing_failed(error: Exception, folder: Path, stage: str, step: int) -> Exception:
    """The error to raise for what went wrong while a checkpoint was written: a CheckpointError if
    it was the disk, `error` itself otherwise."""
    by_torch = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    if not isinstance(error, OSError) and not by_torch:
        return error
    reason = "a file ended early" if by_torch else str(error)
    place = folder if folder.exists() else folder.parent
    free = shutil.disk_usage(place).free / 2**30
    return CheckpointError(
        f"stage {stage} could not write its checkpoint at step {step} to {folder.parent} "
        f"({reason}); {free:.1f} GiB are free there. Make room or set "
        "output=FOLDER on a larger disk, and run the same command again: the stage goes on from "
        "its last checkpoint"
    )


def _layout(setting: Setting, stage: Stage) -> dict[str, Any]:
    """What the files of a checkpoint mean nothing without."""
    compute = setting.config.compute
    return {
        "compute.workers": setting.world_size,
        "compute.zero_stage": compute.zero_stage,
        "compute.precision": compute.precision,
        "networks": sorted(stage.engines),
    }
