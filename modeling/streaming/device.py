"""Work that a GPU does while the host goes on: copies that do not wait, and marks in its queue.

On a CPU the same calls are plain: nothing is copied, and everything marked is already done.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; the host does not wait for a copy to a GPU."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """x on the host: x itself, or from a GPU a copy, whole once a later mark was waited for."""
    if x.device.type != "cuda":
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


class DeviceClock:
    """Marks in the device's own order of work: CUDA events on a GPU, the clock on a CPU.

    Marking does not wait for the device, so that timing a part leaves the whole as fast as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        """Until all work that was asked for before `mark` is done."""
        if self._cuda:
            mark.synchronize()

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; on a GPU only once `end` was waited for."""
        return float(start.elapsed_time(end) if self._cuda else (end - start) * 1000)
