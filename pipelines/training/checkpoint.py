"""Checkpoints of a stage in mid-training: everything that an exact continuation needs.

Each rank writes its own part (its shards of every engine's optimizer and master weights, of the
EMA, its place in the data, and a manifest with the checksums of these files) and Ray merges the
parts into one folder. There is no random state to keep: see `stages.base.Draw`.

On as many workers as wrote it a checkpoint goes on bit by bit. On another number DeepSpeed's
universal checkpoint is made of it; optimizer and averages are the same then, but each worker takes
other pairs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from data.loader import Loader
from infra.runtime.errors import UserError
from pipelines.training.methods.base import Setting, Stage
from pipelines.training.run_folder import RunFolder
from pipelines.training.zero import load_engine, make_universal

_TAG = "state"  # DeepSpeed's name for the subfolder of an engine
_UNIVERSAL = "universal"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used; the message says what to do."""


def save(
    folder: Path, setting: Setting, stage: Stage, step: int, loader: dict[str, Any], epochs: float
) -> None:
    """Write this rank's part of the state after `step` steps into `folder`; a collective.

    `loader` is this rank's place in the data, which it has read `epochs` times.
    """
    try:
        for name, engine in stage.engines.items():
            engine.save_checkpoint(str(folder / name), tag=_TAG, save_latest=False)
        state = {
            "step": step,
            "epochs": epochs,
            "loader": loader,
            "ema": stage.ema.state_dict() if stage.ema else None,
        }
        with (folder / f"worker-{setting.rank}.pt").open("wb") as file:
            torch.save(state, file)
        manifest = {
            "step": step,
            "workers": setting.world_size,
            "layout": _layout(setting, stage),
            "settings": setting.plain(),
            "files": {
                str(path.relative_to(folder)): _checksum(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        }
        (folder / _manifest(setting.rank)).write_text(json.dumps(manifest))
    except (OSError, RuntimeError) as error:
        raise writing_failed(error, folder, setting.stage, step) from error


def choose(folder: RunFolder, setting: Setting) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and what is wrong with newer ones; a collective.

    Raises CheckpointError where there are checkpoints and none is whole.
    """
    wrong: list[str] = []
    for saved in folder.checkpoints():
        mine = _damage(saved, setting.rank, setting.world_size)
        found: list[Any] = [None] * setting.world_size
        distributed.all_gather_object(found, mine)
        if not any(found):
            return saved, wrong
        wrong.append(f"{saved.name}: {next(filter(None, found))}")
    if wrong:
        raise CheckpointError(
            f"stage {setting.stage} cannot go on: no checkpoint in {folder.path} is whole "
            f"({'; '.join(wrong)}); restore these files, or remove the folder to begin the stage "
            "again"
        )
    return None, []


def load(saved: Path, setting: Setting, stage: Stage, batches: Loader) -> tuple[int, float]:
    """Restore `stage` and `batches` from a merged checkpoint; returns steps done and epochs read.

    A collective. Raises CheckpointError for what does not fit.
    """
    manifest = json.loads((saved / _manifest(0)).read_text())
    layout = _layout(setting, stage)
    different = [
        f"{name} was {manifest['layout'][name]!r} and is {value!r}"
        for name, value in layout.items()
        if manifest["layout"][name] != value
    ]
    if manifest["step"] > setting.section.steps:
        different.append(
            f"it was taken after {manifest['step']} steps and {setting.stage}.steps is "
            f"{setting.section.steps}"
        )
    if different:
        raise CheckpointError(
            f"the checkpoint of stage {setting.stage} does not fit: {'; '.join(different)}; set it "
            f"back, or move {saved.parent} away to start the stage again"
        )
    old = manifest["workers"]
    same = old == setting.world_size
    states = [
        torch.load(saved / f"worker-{rank}.pt", map_location=setting.device, weights_only=True)
        for rank in ([setting.rank] if same else range(old))
    ]
    with _Universal(saved, setting, stage, needed=not same) as folder:
        for name, engine in stage.engines.items():
            load_engine(engine, folder / name, _TAG if folder == saved else _UNIVERSAL)
    if stage.ema:
        stage.ema.load_state_dicts([state["ema"] for state in states])
    if not batches.goes_on_from(states[0]["loader"]):
        batches.skip(states[0]["epochs"])
    else:
        batches.load_state_dict(states[0]["loader"])
    return manifest["step"], states[0]["epochs"]


def changed_settings(saved: Path, setting: Setting) -> list[str]:
    """Which settings are others than those that the checkpoint was trained with, with both."""
    before = json.loads((saved / _manifest(0)).read_text())["settings"]
    now = setting.plain()
    return [
        f"{name} {before.get(name)} -> {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]


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


class _Universal:
    """The folder to load from: the checkpoint's own, or one that any number of workers can load,
    which rank 0 makes beside it and which goes again. Entered and left by all ranks together."""

    def __init__(self, saved: Path, setting: Setting, stage: Stage, needed: bool) -> None:
        self.saved, self.rank, self.names = saved, setting.rank, list(stage.engines)
        # Without sharding every rank's copy is the whole.
        self.needed = needed and setting.config.compute.zero_stage > 0
        self.made = saved.parent / ".universal"

    def __enter__(self) -> Path:
        if not self.needed:
            return self.saved
        if self.rank == 0:
            shutil.rmtree(self.made, ignore_errors=True)
            for name in self.names:
                make_universal(self.saved / name / _TAG, self.made / name / _UNIVERSAL)
        distributed.barrier()
        return self.made

    def __exit__(self, *error: object) -> None:
        if self.needed:
            distributed.barrier()
            if self.rank == 0:
                shutil.rmtree(self.made, ignore_errors=True)


def _damage(saved: Path, rank: int, world_size: int) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files; None for nothing."""
    try:
        workers = json.loads((saved / _manifest(0)).read_text())["workers"]
        for part in range(rank, workers, world_size):
            manifest = json.loads((saved / _manifest(part)).read_text())
            for name, expected in manifest["files"].items():
                if _checksum(saved / name) != expected:
                    return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(rank: int) -> str:
    return f"manifest-{rank}.json"


def _layout(setting: Setting, stage: Stage) -> dict[str, Any]:
    """What the files of a checkpoint mean nothing without."""
    compute = setting.config.compute
    return {
        "compute.zero_stage": compute.zero_stage,
        "compute.precision": compute.precision,
        "networks": sorted(stage.engines),
    }
