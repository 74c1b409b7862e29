"""What a measurement was taken on, how much memory it took, and a yardstick of the machine."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra.runtime.paths import ROOT
from modeling.streaming.device import DeviceClock

GIB = 2**30


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine and the software under us; None where it cannot be told."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        told = _output("nvidia-smi", *query, f"--id=GPU-{properties.uuid}")
        driver, _, power = (told or "").partition(", ")
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / GIB, 1),
            "driver": driver or None,
            "power_limit": power or None,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


class Memory:
    """Peak memory since `reset`, in GiB.

    On a GPU: what the process holds of the card (tensors, CUDA graphs and the allocator's slack).
    On a CPU: the process's largest resident size ever, which `reset` cannot lower.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.measure = "cuda reserved" if self._cuda else "process resident"

    def reset(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._cuda)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def held(self) -> float | None:
        """What tensors occupy now, in GiB; None on a CPU, where nothing tells it apart."""
        return torch.cuda.memory_allocated(self._cuda) / GIB if self._cuda else None

    def peak(self) -> float:
        if self._cuda:
            return torch.cuda.max_memory_reserved(self._cuda) / GIB
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def weights_gib(*modules: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for m in modules for p in m.parameters()) / GIB


def yardstick(device: torch.device, repeats: int = 20) -> dict[str, float]:
    """Median time of one large square matrix product: what this machine can do, whatever we do."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock = DeviceClock(device)
    times = []
    for _ in range(repeats + 3):
        start = clock.mark()
        torch.mm(a, b)
        end = clock.mark()
        clock.wait(end)
        times.append(clock.between(start, end))
    ms = float(np.median(times[3:]))
    return {"size": size, "ms": ms, "tflops": 2 * size**3 / ms / 1e9}


def _cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails (an image without git, a CPU)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
