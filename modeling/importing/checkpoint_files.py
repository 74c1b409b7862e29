"""Reading other people's weight files: safetensors and torch's own, whole or in shards.

Nothing in a file is ever executed, and a file that is not what it claims is refused in words that
say what it is. Tensors are mapped from the file where the format allows it, so that opening 50 GB
costs no memory.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infra.runtime.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class WeightsError(UserError):
    """A checkpoint that cannot be used; the message names the file, the fault and the remedy."""


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of one network: one file, or shards and the index that lists them."""

    name: Path  # what a user would call it: the file, or the index
    files: tuple[Path, ...]

    def read(self) -> dict[str, Any]:
        """Name to tensor, or a training checkpoint's nested dicts."""
        state: dict[str, Any] = {}
        for file in self.files:
            state |= read_file(file)
        return state


def find_weights(path: Path) -> list[WeightFiles]:
    """The weight files at `path`: a file itself, or every set that lies directly in a folder.

    Where a folder has safetensors, .bin files beside them are older copies and are left out.
    """
    if path.is_file():
        return (
            [_sharded(path)] if path.name.endswith(".index.json") else [WeightFiles(path, (path,))]
        )
    indexes = sorted(path.glob("*.index.json"))  # other frameworks have some too
    indexed = [_sharded(index) for index in indexes if Path(index.stem).stem.endswith(SUFFIXES)]
    taken = {file for found in indexed for file in found.files}
    single = [
        WeightFiles(file, (file,))
        for file in sorted(path.iterdir())
        if file.is_file() and file.suffix in SUFFIXES and file not in taken
    ]
    found = indexed + single
    if any(part.files[0].suffix == ".safetensors" for part in found):
        found = [part for part in found if part.files[0].suffix != ".bin"]
    return found


def read_file(file: Path) -> dict[str, Any]:
    """What a weight file holds; WeightsError if it is no weight file, is cut off or has code."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            head = opened.read(1024)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    _refuse_impostor(file, head)
    if head[8:9] == b"{":
        if (needed := 8 + int.from_bytes(head[:8], "little")) > size:
            raise WeightsError(
                f"{file} is cut off: its header alone is {needed} bytes and the file {size}; "
                "download it again"
            )
        try:
            return dict(load_file(file))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} is a damaged or incomplete safetensors file ({error}); download it again"
            ) from error
    return _read_torch(file, head)


def sha256(files: Iterable[Path], on_bytes: Callable[[int], None] = lambda read: None) -> list[str]:
    """The SHA-256 of each file; `on_bytes` hears of every piece read."""
    digests = []
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while piece := opened.read(1 << 22):
                digest.update(piece)
                on_bytes(len(piece))
        digests.append(digest.hexdigest())
    return digests


def check_tensors(
    found: dict[str, Tensor], wanted: dict[str, Tensor], label: str, remedy: str
) -> None:
    """Names and shapes of `found` must be those of `wanted`; the error lists every difference."""
    wrong = [f"missing: {name} {_shape(wanted[name])}" for name in wanted if name not in found]
    wrong += [f"not known: {name} {_shape(found[name])}" for name in found if name not in wanted]
    wrong += [
        f"wrong shape: {name} is {_shape(found[name])}, expected {_shape(wanted[name])}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if wrong:
        lines = "\n  ".join(wrong)
        raise WeightsError(f"{label}: {len(wrong)} tensors do not fit. {remedy}\n  {lines}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _sharded(index: Path) -> WeightFiles:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of weight shards: {error!r}") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise WeightsError(f"{index} names files outside its folder: {', '.join(outside)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise WeightsError(
            f"{index} lists {len(names)} shards, and these are missing: {', '.join(missing)}; "
            "download them too"
        )
    return WeightFiles(index, tuple(index.parent / name for name in names))


def _read_torch(file: Path, head: bytes) -> dict[str, Any]:
    archive = head[:2] == b"PK"
    if archive and not zipfile.is_zipfile(file):
        raise WeightsError(f"{file} is cut off: its end is missing; download it again")
    if not archive and head[:1] != b"\x80":
        raise WeightsError(
            f"{file} is neither a safetensors nor a torch file (it starts with {head[:16]!r})"
        )
    try:
        # Files of torch before 1.6 are bare pickles, which cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        holds = f"holds {named[1]}, which is no tensor" if named else "is damaged or no torch file"
        raise WeightsError(
            f"{file} {holds}. It could run code, so it was not loaded: ask for plain tensors, "
            "best as safetensors"
        ) from error
    except (RuntimeError, SafetensorError, EOFError, ValueError, KeyError, OSError) as error:
        raise WeightsError(
            f"{file} is a damaged or incomplete torch file ({error}); download it again"
        ) from error
    if not isinstance(state, dict):
        raise WeightsError(f"{file} holds a {type(state).__name__}, not named tensors")
    return state


def _refuse_impostor(file: Path, head: bytes) -> None:
    start = head.lstrip().lower()
    if not head:
        raise WeightsError(f"{file} is empty; download it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{file} is a web page, not weights: the download met a log-in or error page; "
            "download it again"
        )
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` where it lies"
        )
