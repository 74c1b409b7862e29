"""How fast a stage trains on this worker, and what holds it up."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30
# Dense bf16 matrix products by the vendors' datasheets, TFLOP/s; the first that is a word of the
# device's own counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}


def peak_tflops(device: torch.device) -> float | None:
    """Of one device; None where it is not known, as of every CPU."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Of a device in whose name a card is a word: an L40 is no L4."""
    cards = PEAK_TFLOPS.items()
    return next((peak for card, peak in cards if re.search(rf"\b{card}\b", name)), None)


class Speed:
    """What this worker's steps since the last `clear` waited for and worked."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, peak_tflops(device)
        self.clear()

    def clear(self) -> None:
        self.began = time.monotonic()
        self.waited = 0.0  # seconds
        self.saved = 0.0  # seconds in which no step ran because the state was saved
        self.flops: float | None = 0.0
        self.tokens = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time in which there is no batch."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    @contextmanager
    def saving(self) -> Iterator[None]:
        """For the time in which a save holds the steps up."""
        began = time.monotonic()
        yield
        self.saved += time.monotonic() - began

    def work(self, flops: float | None, tokens: float, sharing: int = 1) -> None:
        """Count a batch's model FLOPs, where one that nobody counted leaves none to tell, and its
        tokens; so many workers share both."""
        self.tokens += tokens / sharing
        known = flops is not None and self.flops is not None
        self.flops = self.flops + flops / sharing if known else None  # type: ignore[operator]

    def seconds(self, steps: int) -> float:
        """A step."""
        return (time.monotonic() - self.began) / max(1, steps)

    def held_gib(self) -> float:
        """Most that the process ever held of the GPU; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_reserved(self.device) / GIB

    def figures(self, steps: int, seconds: float) -> dict[str, float]:
        """Of this worker at so many seconds a step: tokens of the pairs a second, model TFLOP/s,
        and their share of the peak, MFU."""
        figures = {}
        if self.tokens:
            figures["tokens_per_second"] = self.tokens / max(1, steps) / seconds
        if self.flops is not None:
            figures["tflops"] = self.flops / max(1, steps) / seconds / 1e12
            if self.peak:
                figures["mfu"] = figures["tflops"] / self.peak
        return figures
