"""The hash by which a model directory is known, and the check that it is still that one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from infra.runtime.errors import UserError

_BLOCK = 1 << 20
_MAX_BLOCKS = 256  # files up to 256 MiB are hashed whole, larger ones at evenly spread blocks


class FingerprintError(UserError):
    """A model directory that is not the one that was meant."""


def model_fingerprint(folder: str | Path) -> str:
    """The hash of a model directory: its networks and sizes, not its card.

    Files above 256 MiB are hashed at 256 evenly spread blocks, so that a model of 28 GB costs a
    second, and two trainings of it still differ.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "card.json":
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            _hash_blocks(path, digest)
    return digest.hexdigest()


def file_fingerprint(path: str | Path) -> str:
    """The hash of one file's size and blocks, as of those of a directory."""
    path = Path(path)
    digest = hashlib.sha256(f"{path.stat().st_size}\n".encode())
    _hash_blocks(path, digest)
    return digest.hexdigest()


def check_fingerprint(what: str, folder: str | Path, expected: str) -> None:
    """Raise a FingerprintError unless `folder` is the model directory that `what` was made of."""
    found = model_fingerprint(folder)
    if found != expected:
        raise FingerprintError(
            f"{what} is not what was registered: the files in {folder} have the fingerprint "
            f"{found[:12]}, the version {expected[:12] or 'has none'}; somebody changed them. "
            "Restore that folder, or take another version: liveedit models list"
        )


def _hash_blocks(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    blocks = -(-size // _BLOCK)
    step = max(1, -(-blocks // _MAX_BLOCKS))
    with path.open("rb") as file:
        for block in range(0, blocks, step):
            file.seek(block * _BLOCK)
            digest.update(file.read(_BLOCK))
