"""How busy an editor's GPU is, and how full: what the driver's `nvidia-smi` says of it.

It counts all that runs there, other processes too, and an MIG slice has no utilisation.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serve.metrics import EditorMetrics

log = logging.getLogger(__name__)

EVERY_S = 5.0
ANSWER_S = 10.0
QUERY = "--query-gpu=utilization.gpu,memory.used,memory.total"
MIB = 2**20


@dataclass(frozen=True)
class GpuReading:
    """NaN for what the driver does not know."""

    utilisation: float  # 0 to 1
    memory: float  # bytes
    total: float


def parse(line: str) -> GpuReading:
    """A line of `nvidia-smi --format=csv,noheader,nounits` for `QUERY`. Raises ValueError."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 3:
        raise ValueError(f"nvidia-smi said {line!r}, not three values")
    percent, used, total = (
        math.nan if field.startswith("[") else float(field) for field in fields
    )  # "[N/A]", "[Not Supported]"
    return GpuReading(percent / 100, used * MIB, total * MIB)


def command(uuid: str) -> Sequence[str]:
    return ("nvidia-smi", f"--id=GPU-{uuid}", QUERY, "--format=csv,noheader,nounits")


async def watch(device: str, metrics: EditorMetrics) -> None:
    """Keeps the gauges of a GPU up to date, which are absent while the driver does not answer;
    returns at once where there is no GPU or no nvidia-smi."""
    if torch.device(device).type != "cuda":
        return
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    told = False
    try:
        while True:
            try:
                set_gauges(metrics, uuid, parse(await _ask(command(uuid))))
                told = False
            except FileNotFoundError as error:
                log.warning("the GPU's utilisation and memory are not known: %s", error)
                return
            except (OSError, ValueError) as error:  # the next answer may be a better one
                clear_gauges(metrics)
                if not told:
                    log.warning("the GPU's utilisation and memory are not known now: %r", error)
                told = True
            await asyncio.sleep(EVERY_S)
    finally:
        clear_gauges(metrics)


def clear_gauges(metrics: EditorMetrics) -> None:
    for gauge in (metrics.gpu_used, metrics.gpu_memory, metrics.gpu_total):
        gauge.clear()


def set_gauges(metrics: EditorMetrics, uuid: str, usage: GpuReading) -> None:
    for gauge, value in (
        (metrics.gpu_used, usage.utilisation),
        (metrics.gpu_memory, usage.memory),
        (metrics.gpu_total, usage.total),
    ):
        if not math.isnan(value):
            gauge.labels(uuid).set(value)


async def _ask(asked: Sequence[str]) -> str:
    """Its first line. Raises OSError where it is not there or fails, and TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        *asked, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(ANSWER_S):
            said, wrong = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        told = (wrong or said).decode(errors="replace").strip()[:200]
        raise OSError(f"{asked[0]} ended with {process.returncode}: {told}")
    return said.decode().partition("\n")[0]
