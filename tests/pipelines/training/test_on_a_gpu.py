"""What a worker does otherwise on a GPU, asked where there is none: PyTorch's answers are told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from infra.runtime.environment import variable
from pipelines.bench import machine
from pipelines.bench.machine import Memory, hardware
from pipelines.training.kernels import prepare, stepping
from pipelines.training.methods import base
from pipelines.training.methods.base import Setting, fast_rollouts, load_start
from pipelines.training.run_folder import RunFolder
from pipelines.training.watch import profiler
from pipelines.training.watch.speed import Speed, peak_tflops
from pipelines.training.watch.system import system_metrics
from tests.pipelines.training.plain import setting

GPU = torch.device("cuda")


def on(
    device: torch.device, stage: str = "distill", section: Any = None, **compute: Any
) -> Setting:
    here = setting(stage, **(section or {}))
    for name, value in compute.items():
        assert hasattr(here.config.compute, name), name
        setattr(here.config.compute, name, value)
    return Setting(here.job, 0, 1, device)


FAST = {"precision": "bf16", "deterministic": False, "zero_stage": 2}


@pytest.mark.parametrize(
    ("device", "section", "changes", "fast"),
    [
        (GPU, {}, {}, True),
        (torch.device("cpu"), {}, {}, False),
        (GPU, {}, {"precision": "fp32"}, False),
        (GPU, {}, {"deterministic": True}, False),
        (GPU, {"rollout_copy": True}, {"zero_stage": 3}, True),
        (GPU, {"rollout_copy": False}, {"zero_stage": 3}, False),
    ],
)
def test_rollouts_run_as_streams_where_weights_are_whole_and_bits_may_differ(
    device: torch.device, section: Any, changes: Any, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SimpleNamespace(RolloutForward=lambda network: f"fast {network}")
    monkeypatch.setitem(sys.modules, "modeling.gpu.training", made)
    found: Any = fast_rollouts("network", on(device, section=section, **FAST | changes))  # type: ignore[arg-type]
    assert found == ("fast network" if fast else None)


@pytest.mark.parametrize("stage", ["vae", "distill"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_steps_kernels_give_the_same_bits_where_that_is_asked_for(
    stage: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To vary is an error within a step alone, and of a VAE, which may know no other way, not."""
    told: list[Any] = []

    @contextmanager
    def attention(*kernels: Any) -> Iterator[None]:
        told.append("chosen" if kernels else "fast")
        yield
        told.append("left")

    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda on, warn_only: told.append((on, warn_only))
    )
    monkeypatch.setattr("pipelines.training.kernels.sdpa_kernel", attention)
    fast = SimpleNamespace(fast_attention=attention)
    monkeypatch.setitem(sys.modules, "modeling.gpu.transformer", fast)
    with stepping(on(torch.device("cpu"), stage, deterministic=deterministic)):
        assert told == []
    with stepping(on(GPU, stage, deterministic=deterministic)):
        told.append("step")
    strict = [(True, stage == "vae"), "chosen", "step", "left", (True, True)]
    assert told == (strict if deterministic else ["fast", "step", "left"])


@pytest.mark.parametrize(
    ("device", "deterministic", "wanted"),
    [(GPU, True, True), (GPU, False, False), (torch.device("cpu"), True, False)],
)
def test_the_same_bits_are_asked_for_of_a_gpu_before_its_first_product(
    device: torch.device, deterministic: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without filling what was not written: DeepSpeed's buckets of gigabytes, every step."""
    told: list[Any] = []
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda on, warn_only: told.append((on, warn_only))
    )
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with torch.random.fork_rng(devices=[]):
        prepare(on(device, deterministic=deterministic))
    assert told == ([(True, True)] if wanted else [])
    assert torch.utils.deterministic.fill_uninitialized_memory is not wanted  # type: ignore[attr-defined]
    assert variable("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)


@pytest.mark.parametrize(
    ("stage", "zero", "whole"), [("distill", 2, True), ("distill", 3, False), ("vae", 3, True)]
)
def test_where_weights_are_sharded_the_transformer_stays_in_the_hosts_memory(
    stage: str, zero: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    vae = SimpleNamespace(to=lambda **where: asked.append(where))

    def load(path: Path, **where: Any) -> Any:
        asked.append((path, where))
        return SimpleNamespace(vae=vae)

    monkeypatch.setattr(base, "load_model", load)
    here = on(GPU, stage, zero_stage=zero)
    assert here.is_sharded is not whole
    load_start(here)
    there = {"device": GPU, "dtype": torch.float32}
    start = here.job.start
    assert asked == ([(start, there)] if whole else [(start, {}), there])


def test_what_a_card_holds_and_can_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60e9, 80e9))
    done: list[str] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: done.append(name))
    assert peak_tflops(GPU) == 989.4
    assert Speed(GPU).held_gib() == 3.0
    found = system_metrics(GPU, tmp_path)
    assert found["system/gpu_0_memory_usage_megabytes"] == 20000.0
    assert found["system/gpu_0_memory_usage_percentage"] == 25.0
    memory = Memory(GPU)
    memory.reset()
    assert done == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert (memory.measure, memory.peak(), memory.held()) == ("cuda reserved", 3.0, 1.0)


@pytest.mark.parametrize(("device", "kernels"), [(GPU, True), (torch.device("cpu"), False)])
def test_a_trace_has_the_kernels_of_a_card(
    device: torch.device, kernels: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    traced: list[set[ProfilerActivity]] = []

    def profile(activities: list[ProfilerActivity], **_: Any) -> Any:
        traced.append(set(activities))
        return SimpleNamespace(start=lambda: None)

    monkeypatch.setattr(profiler, "profile", profile)
    profiler.Profiler(on(device, section={"profile": 2}), RunFolder(tmp_path), 0)
    assert traced == [{ProfilerActivity.CPU} | ({ProfilerActivity.CUDA} if kernels else set())]


@pytest.mark.parametrize(
    ("told", "driver", "power"),
    [("550.1, 700.00 W", "550.1", "700.00 W"), ("550.1", "550.1", None), (None, None, None)],
)
def test_a_card_is_said_with_its_driver_and_its_power(
    told: str | None, driver: str | None, power: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="A card", total_memory=80 * 2**30, uuid="u-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91)
    asked: list[tuple[str, ...]] = []

    def output(*command: str) -> str | None:
        asked.append(command)
        return told if command[0] == "nvidia-smi" else "commit"

    monkeypatch.setattr(machine, "_output", output)
    found = hardware(GPU)
    wanted = {"device": "cuda", "gpu": "A card", "gpu_memory_gib": 80.0, "driver": driver,
              "power_limit": power, "cudnn": 91, "commit": "commit"}  # fmt: skip
    assert wanted.items() <= found.items()
    assert asked[-1][-1] == "--id=GPU-u-1"
