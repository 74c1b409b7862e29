"""Public checkpoints as a model directory.

plan = plan_import(path, vae=..., text=...)     finds and checks everything, writes nothing
write_import(plan, "models/wan")                the model directory, with where each part is from
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from modeling.config import ModelConfig, TextConfig
from modeling.importing.checkpoint_files import WeightsError, sha256
from modeling.importing.parts import NAMES, Part, PartKind, find_networks, read_part
from modeling.importing.text import write_text_folder
from modeling.model_dir import is_model_dir, save_model
from modeling.presets import PRESETS

_UMT5_TOKENS = 512  # what Wan pads and cuts a prompt to
# Wan2.1's own table of models: 480P for 1.3B, 480P and 720P for 14B.
_TRAINED_AT = {"wan-1.3b": ("832x480",), "wan-14b": ("832x480", "1280x720")}
_ROOM = 64 << 20  # bytes beside the weights: tokenizer, headers, JSON

OnProgress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


@dataclass(frozen=True)
class ImportPlan:
    """Everything about an import that is known before the first byte is written."""

    config: ModelConfig
    preset: str | None  # whose transformer has the same sizes
    parts: dict[PartKind, Part]
    dtype: torch.dtype | None

    @property
    def bytes_to_write(self) -> int:
        return sum(part.bytes(self.dtype) for part in self.parts.values())

    @property
    def is_editor(self) -> bool:
        """Whether the transformer reads the source video; a widened one has yet to learn it."""
        if "transformer" not in self.parts:
            return False
        part = self.parts["transformer"]
        source = part.state["patch_embedding.weight"][:, part.config.latent_channels :]
        return bool(source.any())


def plan_import(
    path: Path,
    *,
    vae: Path | None = None,
    text: Path | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
) -> ImportPlan:
    """Find and check the networks at `path`, a file or folder, and those at `vae` and `text`.

    `vae` and `text` go before what `path` holds. `ema` takes the moving average of a training
    checkpoint. `dtype` None keeps the files' types. Raises WeightsError.
    """
    networks = dict(find_networks(path))
    given: list[tuple[PartKind, Path | None]] = [("vae", vae), ("text", text)]
    for kind, place in given:
        if place is not None:
            found = find_networks(place)
            if kind not in found:
                others = " and ".join(f"a {NAMES[other]}" for other in found)
                raise WeightsError(f"--{kind} {place} holds no {NAMES[kind]}, but {others}")
            networks[kind] = found[kind]
    if ema and "transformer" not in networks:
        raise WeightsError(f"--ema: {path} holds no transformer")
    order: tuple[PartKind, ...] = ("transformer", "vae", "text")
    parts = {kind: read_part(networks[kind], ema=ema) for kind in order if kind in networks}
    preset, config = _model_config(parts)
    return ImportPlan(config, preset, parts, dtype)


def write_import(
    plan: ImportPlan,
    to: Path,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda task, done, total: None,
) -> Path:
    """Write the model directory `to`; WeightsError if it is taken or the disk is too small."""
    check_target(to, overwrite=overwrite)
    check_space(to, plan.bytes_to_write)
    card: dict[str, Any] = {
        "name": to.name,
        "parent": None,
        "preset": plan.preset,
        "imported_from": {
            kind: _describe(part, partial(on_progress, f"hashing {NAMES[kind]}"))
            for kind, part in plan.parts.items()
        },
    }
    if plan.preset in _TRAINED_AT:
        card["trained_at"] = list(_TRAINED_AT[plan.preset])
    states = {kind: part.state for kind, part in plan.parts.items()}
    with _watched(to, partial(on_progress, "writing"), plan.bytes_to_write):
        return save_model(
            to,
            plan.config,
            transformer=states.get("transformer"),
            vae=states.get("vae"),
            text=partial(_write_text, plan) if "text" in states else None,
            card=card,
            dtype=plan.dtype,
        )


def check_target(to: Path, *, overwrite: bool) -> None:
    """`to` must be free, or a model directory that may be replaced."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not to.is_dir() or not is_model_dir(to):
        raise WeightsError(f"{to} holds something else; give --to a new folder")
    if not overwrite:
        raise WeightsError(f"{to} is a model already; add --overwrite to replace it")


def check_space(to: Path, needed: int) -> None:
    """The disk of `to` must have room for `needed` bytes of weights."""
    place = next(parent for parent in to.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed + _ROOM:
        raise WeightsError(
            f"the model takes {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free; make "
            "room, choose another disk with --to, or write smaller weights with --dtype bf16"
        )


def _model_config(parts: dict[PartKind, Part]) -> tuple[str | None, ModelConfig]:
    """The preset with the transformer's sizes, if there is one, and the whole config."""
    found: dict[str, Any] = {kind: part.config for kind, part in parts.items()}
    sizes = found.get("transformer")
    preset = next((name for name in PRESETS if PRESETS[name].transformer == sizes), None)
    config = PRESETS[preset or "wan-1.3b"]
    if "text" in found:
        dim = found["text"]["d_model"]
    else:
        dim = sizes.text_dim if sizes else config.text.dim
    found["text"] = TextConfig("umt5", dim=dim, tokens=_UMT5_TOKENS)
    try:
        return preset, replace(config, **found)
    except ValueError as error:
        raise WeightsError(f"the parts do not fit each other: {error}") from error


def _write_text(plan: ImportPlan, target: Path) -> None:
    part = plan.parts["text"]
    assert part.tokenizer is not None
    state = {name: tensor.to(plan.dtype or tensor.dtype) for name, tensor in part.state.items()}
    write_text_folder(target, state, part.config, part.tokenizer)


@contextmanager
def _watched(to: Path, on_progress: Callable[[int, int], None], total: int) -> Iterator[None]:
    """Report twice a second how far the draft of `to` has grown; safetensors itself is silent."""
    finished = Event()

    def watch() -> None:
        while not finished.wait(0.5):
            drafts = to.absolute().parent.glob(f".{to.name}-*/**/*.safetensors")
            with suppress(OSError):  # the draft is renamed in between
                on_progress(min(total, sum(file.stat().st_size for file in drafts)), total)

    watcher = Thread(target=watch, daemon=True)
    on_progress(0, total)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    on_progress(total, total)


def _describe(part: Part, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Where a part is from, for the card."""
    files = part.weights.files
    sizes = [file.stat().st_size for file in files]
    done = 0

    def on_bytes(read: int) -> None:
        nonlocal done
        done += read
        on_progress(done, sum(sizes))

    listed = [
        {"name": file.name, "bytes": size, "sha256": digest}
        for file, size, digest in zip(files, sizes, sha256(files, on_bytes), strict=True)
    ]
    return {"layout": part.layout, "files": listed, "notes": part.notes}
