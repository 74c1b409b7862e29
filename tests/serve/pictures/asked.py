"""How the tests of pictures ask, and what they compare."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import httpx
import numpy as np

from tests.data.conftest import write_raw
from tests.known_editors import (
    BLOCK,
)
from tests.serve.conftest import Server

RED, BLUE = "paint it red", "paint it blue"


def post(server: Server, path: Path, **fields: str) -> httpx.Response:
    return httpx.post(
        f"{server.http}/v1/edits",
        files={"video": (path.name, path.read_bytes())},
        data=fields,
        timeout=60,
    )


def blocks(frames: np.ndarray) -> np.ndarray:
    """The means of the insides of the editor's blocks, where a codec costs little."""
    n, height, width, _ = frames.shape
    cells = frames.reshape(n, height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3).astype(float)
    return cells[:, :, 2:-2, :, 2:-2].mean(axis=(2, 4))


def lossless(path: Path, frames: np.ndarray, fps: Fraction | int = 16) -> Path:
    return write_raw(path, frames, fps=fps, codec="ffv1", pixel_format="bgr0")
