"""One measured clip of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MAKERS = ("numpy", "pillow", "av")  # whose versions may move a pixel of a clip


@dataclass(frozen=True)
class Judged:
    """One clip's row of the report, its middle frame for the sheet, and of a long clip the PSNR of
    every second against the truth."""

    row: dict[str, Any]
    source: np.ndarray  # uint8 [H, W, 3]
    edit: np.ndarray
    truth: np.ndarray
    by_second: list[float] | None = None
