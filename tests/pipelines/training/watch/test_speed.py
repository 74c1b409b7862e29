"""What a worker's reports say of its time, its work and its machine, by hand."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from pipelines.training.watch.speed import Speed, peak_of, peak_tflops
from pipelines.training.watch.system import system_metrics
from pipelines.training.watch.watchdog import (
    COMPUTES,
    EXPORTS,
    READS,
    REPORTS,
    SAVES,
    STARTS,
    VALIDATES,
    WORDS,
    Place,
)

CPU = torch.device("cpu")


def test_what_steps_waited_for_and_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of two batches, of which four workers share the second."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    speed = Speed(CPU)
    assert speed.peak is peak_tflops(CPU) is None
    assert speed.held_gib() == 0
    for waited, saved in ((3.0, 7.0), (2.0, 1.0)):
        with speed.waiting():
            now[0] += waited
        with speed.saving():
            now[0] += saved
    speed.work(6e12, 600.0)
    speed.work(4e12, 200.0, sharing=4)
    assert (speed.waited, speed.saved, speed.seconds(2)) == (5.0, 8.0, 6.5)
    assert speed.figures(2, 5.0) == {"tokens_per_second": 65.0, "tflops": 0.7}
    speed.peak = 2.0
    assert speed.figures(2, 5.0)["mfu"] == pytest.approx(0.35)
    assert speed.figures(0, 5.0)["tflops"] == pytest.approx(1.4)  # no step yet: as of one
    speed.work(None, 100.0)  # which nobody can count
    speed.work(1e12, 0.0)
    assert speed.figures(2, 5.0) == {"tokens_per_second": 75.0}
    speed.clear()
    now[0] += 4
    assert (speed.waited, speed.saved, speed.seconds(1), speed.seconds(0)) == (0, 0, 4, 4)
    assert speed.figures(1, 1.0) == {"tflops": 0.0, "mfu": 0.0}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("H1000", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100", None),
    ],
)
def test_a_cards_peak_is_that_of_its_datasheet(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_the_machines_figures_are_in_mlflows_units(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def disk(path: str) -> SimpleNamespace:
        assert path == str(tmp_path)
        return SimpleNamespace(used=3e9, free=4e9, percent=60.0)

    memory = SimpleNamespace(used=2e9, percent=25.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "disk_usage", disk)
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 12.5)
    assert system_metrics(CPU, tmp_path) == {
        "system/cpu_utilization_percentage": 12.5,
        "system/system_memory_usage_megabytes": 2000.0,
        "system/system_memory_usage_percentage": 25.0,
        "system/disk_usage_megabytes": 3000.0,
        "system/disk_available_megabytes": 4000.0,
        "system/disk_usage_percentage": 60.0,
    }


def at(step: int, batch: int, doing: int) -> Place:
    return Place(step, batch, doing, 61.6, 7, "here", ["a:1 f", "b:2 g", "c:3 h", "d:4 i", "e:5 j"])


def test_places_are_in_the_order_in_which_a_worker_comes_to_them() -> None:
    """Batch after batch of a step, and only then what ends it."""
    places = [
        at(0, 0, STARTS),
        at(0, 0, READS), at(0, 0, COMPUTES), at(0, 1, READS), at(0, 1, COMPUTES),
        at(0, 2, REPORTS), at(0, 2, SAVES), at(0, 2, VALIDATES),
        at(1, 0, READS), at(1, 0, COMPUTES),
        at(1, 0, EXPORTS),
    ]  # fmt: skip
    order = [place.progress for place in places]
    assert order == sorted(set(order))
    for doing, word in enumerate(WORDS):
        assert at(3, 0, doing).line() == (
            f"has been {word} after step 3 for 62 s (process 7 on here), in "
            "b:2 g > c:3 h > d:4 i > e:5 j"
        )
