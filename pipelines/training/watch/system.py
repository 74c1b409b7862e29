"""What the first worker's machine is doing, under the names that MLflow's page of system metrics
has. Measured by the worker, not by MLflow's own thread, which would watch the driver's machine and
wait for the server."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

MB = 1e6


def system_metrics(device: torch.device, output: Path) -> dict[str, float]:
    """CPU since the last call, memory, the disk that `output` lies on, and a GPU's memory as the
    driver counts it: all processes'."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(output))
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MB,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_megabytes": disk.used / MB,
        "system/disk_available_megabytes": disk.free / MB,
        "system/disk_usage_percentage": disk.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        metrics["system/gpu_0_memory_usage_megabytes"] = (total - free) / MB
        metrics["system/gpu_0_memory_usage_percentage"] = 100 * (total - free) / total
    return metrics
