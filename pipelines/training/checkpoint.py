"""Checkpoints of a stage in mid-training: everything that an exact continuation needs.

Each rank has its own part: its shards of every engine's optimizer and master weights, of the EMA,
its place in the data, and a manifest with the checksums of these files. It is taken between two
steps, as a copy in memory, and written behind the next ones (`pipelines.training.saver`). There is
no random state to keep: see `methods.base.Draw`.

On as many workers as wrote it a checkpoint goes on bit by bit. On another number, with another ZeRO
stage or precision DeepSpeed's universal checkpoint is made of it: masters, moments and averages are
the same then, but on another number each worker takes other pairs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import distributed

from data.loader import Loader
from infra.runtime.errors import UserError
from pipelines.training.methods.base import Setting, Stage
from pipelines.training.run_folder import RunFolder
from pipelines.training.zero.inside import load_engine, make_universal, save_engine

_TAG = "state"  # DeepSpeed's name for the subfolder of an engine
_UNIVERSAL = "universal"
_PIECE, _SMALL = 64 << 20, 1 << 20  # bytes
ZERO = "compute.zero_stage"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used; the message says what to do."""


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of a state, in memory: the next step does not change it."""

    place: Path  # where its files are written, until all of them are
    states: dict[Path, Any]  # by file
    manifest: dict[str, Any]  # all but the checksums
    stage: str

    def write(self, target: Path) -> None:
        """Write the files and their checksums, and move them to `target`, which other ranks share.

        The manifest comes last, so that a checkpoint that lacks one was never finished. Raises
        CheckpointError if it is the disk that fails.
        """
        try:
            files = {}
            for path in (path for path in self.place.rglob("*") if path.is_file()):
                files[str(path.relative_to(self.place))] = _checksum(path)  # DeepSpeed's script
            with ThreadPoolExecutor(1) as beside:
                for path, state in self.states.items():
                    with path.open("wb") as file:
                        hashed = _Hashed(file, beside)
                        torch.save(state, cast(BinaryIO, hashed))
                    files[str(path.relative_to(self.place))] = hashed.checksum()
            for name in files:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (self.place / name).replace(target / name)
            unfinished = self.place / "manifest.json"
            unfinished.write_text(json.dumps(self.manifest | {"files": files}))
            unfinished.replace(target / _manifest(self.manifest["rank"]))
        except (OSError, RuntimeError) as error:
            raise _writing_failed(error, target, self.stage, self.manifest["step"]) from error
        finally:
            shutil.rmtree(self.place, ignore_errors=True)


def take(
    place: Path,
    setting: Setting,
    stage: Stage,
    step: int,
    loader: dict[str, Any],
    epochs: float,
    metrics: dict[str, float],
    copy: Callable[[Any], Any],
) -> Snapshot:
    """This rank's part of the state after `step` steps; a collective.

    `loader` is this rank's place in the data, which it has read `epochs` times, and `metrics` are
    the last, with which a stage ends that has no step left; `copy` gives a
    state's copy in this machine's memory. Nothing but folders is written in `place`.
    """
    states: dict[Path, Any] = {}

    def collect(state_dict: Any, path: str) -> None:
        states[Path(path)] = copy(state_dict)

    for name, engine in stage.engines.items():
        save_engine(engine, place / name, _TAG, collect)
    own = {
        "step": step,
        "epochs": epochs,
        "loader": loader,
        "metrics": metrics,
        "ema": stage.ema.state_dict() if stage.ema else None,
    }
    states[place / f"worker-{setting.rank}.pt"] = copy(own)
    manifest = {
        "rank": setting.rank,
        "step": step,
        "workers": setting.world_size,
        "layout": _layout(setting, stage),
        "settings": setting.plain(),
    }
    return Snapshot(place, states, manifest, setting.stage)


def choose(folder: RunFolder, setting: Setting) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and what is wrong with newer ones; a collective.

    One that was never finished, as when a worker is killed while it writes, is removed if there is
    an older one. Raises CheckpointError where there are checkpoints and none is whole.
    """
    wrong: list[str] = []
    unfinished: list[Path] = []
    for saved in folder.checkpoints():
        mine = _damage(saved, setting.rank, setting.world_size)
        found: list[Any] = [None] * setting.world_size
        distributed.all_gather_object(found, mine)
        if not any(found):
            if setting.rank == 0:
                for leftover in unfinished:
                    shutil.rmtree(leftover)
            return saved, wrong
        if _is_unfinished(saved):
            unfinished.append(saved)
        wrong.append(f"{saved.name}: {next(filter(None, found))}")
    if wrong:
        raise CheckpointError(
            f"stage {setting.stage} cannot go on: no checkpoint in {folder.path} is whole "
            f"({'; '.join(wrong)}); restore these files, or remove the folder to begin the stage "
            "again"
        )
    return None, []


def load(
    saved: Path, setting: Setting, stage: Stage, batches: Loader
) -> tuple[int, float, dict[str, float]]:
    """Restore `stage` and `batches` from a merged checkpoint; returns steps done, epochs read and
    the metrics of that time.

    A collective. Raises CheckpointError for what does not fit.
    """
    manifest = json.loads((saved / _manifest(0)).read_text())
    layout = _layout(setting, stage)
    was = layout | manifest["layout"]
    changed = sorted(name for name, value in layout.items() if was[name] != value)
    different = []
    if "networks" in changed:
        different.append(f"networks was {was['networks']!r} and is {layout['networks']!r}")
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
    same = old == setting.world_size and not changed
    states = [
        torch.load(saved / f"worker-{rank}.pt", map_location="cpu", weights_only=True)
        for rank in ([setting.rank] if same else range(old))
    ]
    shards = was[ZERO] > 0 or layout[ZERO] > 0  # else every rank's copy is the whole
    with _Universal(saved, setting, stage, needed=shards and not same) as folder:
        for name, engine in stage.engines.items():
            load_engine(engine, folder / name, _TAG if folder == saved else _UNIVERSAL)
    if stage.ema:
        stage.ema.load_state_dicts([state["ema"] for state in states])
    mine = states[setting.rank if old == setting.world_size and not same else 0]
    if not batches.goes_on_from(mine["loader"]):
        batches.skip(mine["epochs"])
    else:
        batches.load_state_dict(mine["loader"])
    return manifest["step"], mine["epochs"], mine.get("metrics", {})


def changed_settings(saved: Path, setting: Setting) -> list[str]:
    """Which settings are others than those that the checkpoint was trained with, with both."""
    before = json.loads((saved / _manifest(0)).read_text())["settings"]
    now = setting.plain()
    return [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]


def _writing_failed(error: Exception, folder: Path, stage: str, step: int) -> Exception:
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
    """The folder to load from: the checkpoint's own, or one that these workers can load, which
    rank 0 makes beside it and which goes again. Entered and left by all ranks together."""

    def __init__(self, saved: Path, setting: Setting, stage: Stage, needed: bool) -> None:
        self.saved, self.rank, self.engines = saved, setting.rank, stage.engines
        self.zero_stage, self.workers = setting.config.compute.zero_stage, setting.world_size
        self.needed = needed
        self.made = saved.parent / ".universal"

    def __enter__(self) -> Path:
        if not self.needed:
            return self.saved
        if self.rank == 0:
            shutil.rmtree(self.made, ignore_errors=True)
            for name, engine in self.engines.items():
                source, target = self.saved / name / _TAG, self.made / name / _UNIVERSAL
                parts = [n for n, p in engine.module.named_parameters() if p.requires_grad]
                make_universal(source, target, self.zero_stage, self.workers, parts)
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


def _is_unfinished(saved: Path) -> bool:
    """Whether some rank never wrote its manifest."""
    if not (saved / _manifest(0)).is_file():
        return True
    try:
        workers = json.loads((saved / _manifest(0)).read_text())["workers"]
    except (ValueError, KeyError):
        return False
    return not all((saved / _manifest(rank)).is_file() for rank in range(workers))


class _Hashed:
    """A file for `torch.save` that is hashed while it is written, by a thread `beside`.

    Steps run meanwhile, and whoever hashes and writes takes the interpreter's lock from them, and
    waits up to 5 ms for it, before and after each piece. So pieces are large: to hash a file of
    18 GiB afterwards, as `hashlib.file_digest` does, it is taken 150 000 times.
    """

    def __init__(self, file: BinaryIO, beside: Executor) -> None:
        self._file, self._beside = file, beside
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        whole = memoryview(data)
        for first in range(0, len(whole), _PIECE):
            piece = whole[first : first + _PIECE]
            if len(piece) < _SMALL:  # sooner hashed than handed over
                self._digest.update(piece)
                self._file.write(piece)
                continue
            hashing = self._beside.submit(self._digest.update, piece)
            try:
                self._file.write(piece)
            finally:
                hashing.result()
        return len(whole)

    def flush(self) -> None:
        self._file.flush()

    def checksum(self) -> str:
        return self._digest.hexdigest()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(rank: int) -> str:
    return f"manifest-{rank}.json"


def _layout(setting: Setting, stage: Stage) -> dict[str, Any]:
    """What the files of a checkpoint mean nothing without."""
    compute = setting.config.compute
    return {
        ZERO: compute.zero_stage,
        "compute.precision": compute.precision,
        "compute.offload": compute.offload,
        "networks": sorted(stage.engines),
    }
