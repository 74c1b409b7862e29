"""A GPU's utilisation and memory in the metrics, from what nvidia-smi prints."""

from __future__ import annotations

import asyncio
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from serve.editor import gpu
from serve.editor.gpu import MIB, GpuReading, parse, watch
from serve.metrics import EditorMetrics

pytestmark = pytest.mark.anyio

NAMES = ("gpu_utilisation", "gpu_memory_bytes", "gpu_memory_total_bytes")


@pytest.mark.parametrize(
    ("line", "usage"),
    [
        ("37, 40536, 81559", GpuReading(0.37, 40536 * MIB, 81559 * MIB)),
        ("0, 0, 81559", GpuReading(0.0, 0.0, 81559 * MIB)),
        ("100,1,2\r", GpuReading(1.0, 1_048_576, 2_097_152)),
        ("[N/A], 4096, 20096", GpuReading(math.nan, 4096 * MIB, 20096 * MIB)),  # an MIG slice
        ("[Not Supported], [Not Supported], 8192", GpuReading(math.nan, math.nan, 8192 * MIB)),
    ],
)
def test_what_nvidia_smi_prints_is_read(line: str, usage: GpuReading) -> None:
    assert astuple(parse(line)) == pytest.approx(astuple(usage), nan_ok=True)


@pytest.mark.parametrize("line", ["", "No devices were found", "1, 2", "1, 2, 3, 4", "a, b, c"])
def test_what_it_prints_otherwise_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"three values|could not convert"):
        parse(line)


def values(metrics: EditorMetrics) -> dict[str, float]:
    """Those of the GPU, of which absent ones have no sample."""
    return {
        sample.name.removeprefix("liveedit_"): sample.value
        for metric in metrics.snapshot()
        for sample in metric.samples
        if sample.name.removeprefix("liveedit_") in NAMES
    }


async def test_without_a_gpu_there_are_none() -> None:
    metrics = EditorMetrics()
    await asyncio.wait_for(watch("cpu", metrics), 5)
    assert values(metrics) == {}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program in nvidia-smi's place, which a test writes; and a GPU that is called u1."""
    properties = SimpleNamespace(uuid="u1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu, "EVERY_S", 0.01)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "nvidia-smi"


def write(driver: Path, script: str) -> None:
    driver.write_text(f"#!/bin/sh\n{script}\n")
    driver.chmod(driver.stat().st_mode | stat.S_IEXEC)


def replace(driver: Path, script: str) -> None:
    """At once, so that it is never half written when it is run."""
    write(driver.with_name("new"), script)
    driver.with_name("new").rename(driver)


@pytest.mark.parametrize("wrong", ["exec sleep 60", "echo a, b, c", "echo GPU is lost; exit 15"])
async def test_the_gauges_follow_what_it_says_and_are_absent_while_it_says_nothing(
    driver: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    """The log says so once, each time that it begins."""
    answers, ask = 0, gpu._ask

    async def counted(asked: Sequence[str]) -> str:
        nonlocal answers
        try:
            return await ask(asked)
        finally:
            answers += 1

    monkeypatch.setattr(gpu, "_ask", counted)
    good = 'case "$*" in --id=GPU-u1\\ --query*) echo 50, 100, 200;; esac'
    told = {"gpu_utilisation": 0.5, "gpu_memory_bytes": 100 * MIB}
    told["gpu_memory_total_bytes"] = 200 * MIB
    metrics = EditorMetrics()
    replace(driver, good)
    watching = asyncio.create_task(watch("cuda", metrics))
    async with asyncio.timeout(30):
        for script in (good, wrong, good, wrong, good):
            monkeypatch.setattr(gpu, "ANSWER_S", 10 if script == good else 0.1)
            replace(driver, script)
            before, shown = answers, told if script == good else {}
            while values(metrics) != shown or answers < before + 3:
                assert not watching.done()
                await asyncio.sleep(0.01)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert values(metrics) == {}
    assert [record.msg for record in caplog.records] == 2 * [
        "the GPU's utilisation and memory are not known now: %r"
    ]


async def test_a_driver_that_is_not_there_is_no_failure(driver: Path) -> None:
    metrics = EditorMetrics()
    await asyncio.wait_for(watch("cuda", metrics), 30)
    assert values(metrics) == {}


async def test_a_driver_that_hangs_leaves_no_process(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ANSWER_S", 0.5)
    write(driver, f"echo $$ > {tmp_path}/started; exec sleep 60")
    with pytest.raises(TimeoutError):
        await gpu._ask(gpu.command("u1"))
    if (tmp_path / "started").exists():  # on a busy machine it may not have come so far
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "started").read_text()), 0)
