"""What a machine is said to be, to hold and to manage, by hand."""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.bench import hub_load, machine
from pipelines.bench.machine import Memory, hardware, weights_gib, yardstick
from serve.hub.placement import EDITOR_GONE_S

CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "size", "dtype"), [(CPU, 1024, torch.float32), (CARD, 8192, torch.bfloat16)]
)
def test_the_yardstick_is_the_median_after_three_products(
    device: torch.device, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what the device computes in; each is waited for before it is read."""
    times = iter([900.0, 900.0, 900.0, 4.0, 1.0, 2.0, 8.0, 16.0])
    marks, events = itertools.count(), list[Any]()

    def between(start: int, end: int) -> float:
        events.append((start, end))
        return next(times)

    clock = SimpleNamespace(mark=marks.__next__, wait=events.append, between=between)
    monkeypatch.setattr(machine, "DeviceClock", lambda device: clock)
    monkeypatch.setattr(torch, "randn", lambda *sizes, device, dtype: (sizes, device, dtype))
    monkeypatch.setattr(torch, "mm", lambda *factors: events.append(factors))
    found = yardstick(device, repeats=5)
    tflops = pytest.approx(2 * size**3 / 4e-3 / 1e12)
    assert found == {"size": size, "ms": 4.0, "tflops": tflops}
    factors = (((size, size), device, dtype),) * 2
    assert events == [event for n in range(0, 16, 2) for event in (factors, n + 1, (n, n + 1))]
    assert next(times, None) is None


@pytest.mark.parametrize(("platform", "held"), [("linux", 3 * 2**20), ("darwin", 3 * 2**30)])
def test_memory_of_a_cpu_is_the_processs_most(
    platform: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one system tells in KiB, the other in bytes."""
    monkeypatch.setattr(sys, "platform", platform)
    used = SimpleNamespace(ru_maxrss=held)
    monkeypatch.setattr(resource, "getrusage", lambda who: used)
    memory = Memory(CPU)
    memory.reset()
    assert (memory.measure, memory.peak(), memory.held()) == ("process resident", 3.0, None)


def test_memory_of_a_gpu_is_what_the_process_holds_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the allocator's slack at most, of tensors alone now; another measurement's is over."""
    events: list[Any] = []
    figures = {"memory_allocated": 1.5, "memory_reserved": 2.5, "max_memory_allocated": 3.5,
               "max_memory_reserved": 4.5}  # fmt: skip
    for name, gib in figures.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda device, gib=gib: (device == CARD) * gib * 2**30
        )
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(
            torch.cuda, name, lambda device, name=name: events.append((name, device))
        )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty_cache"))
    memory = Memory(CARD)
    memory.reset()
    assert events == [("synchronize", CARD), "empty_cache", ("reset_peak_memory_stats", CARD)]
    assert (memory.measure, memory.peak(), memory.held()) == ("cuda reserved", 4.5, 1.5)


@pytest.mark.parametrize(
    ("told", "driver", "power"),
    [("570.1, 700.00 W", "570.1", "700.00 W"), (None, None, None), ("570.1", "570.1", None)],
)
def test_a_gpu_is_named_with_what_decides_its_speed(
    told: str | None, driver: str | None, power: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="A card", total_memory=int(79.46 * 2**30), uuid="ab-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90100)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(machine, "_output", lambda *words: (asked.append(words), told)[1])
    found = hardware(CARD)
    wanted = {"device": "cuda", "gpu": "A card", "gpu_memory_gib": 79.5, "driver": driver,
              "power_limit": power, "cuda": "12.8", "cudnn": 90100}  # fmt: skip
    assert wanted.items() <= found.items()
    assert asked[-1][0] == "nvidia-smi"
    assert {"--query-gpu=driver_version,power.limit", "--id=GPU-ab-1"} < set(asked[-1])


def test_the_commit_is_that_of_the_code_and_says_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the command is called from."""

    def git(*words: str) -> str:
        us = ("-c", "user.name=x", "-c", "user.email=x@y")
        done = subprocess.run(["git", *us, *words], cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert hardware(CPU)["commit"] is None
    git("init")
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-m", "a")
    commit = git("rev-parse", "HEAD")
    assert len(commit) == 40
    assert hardware(CPU)["commit"] == commit
    (tmp_path / "a").write_text("b")
    assert hardware(CPU)["commit"] == f"{commit}-dirty"


def test_weights_are_counted_in_their_own_precision() -> None:
    small = nn.Linear(8, 4).to(torch.bfloat16)
    assert weights_gib(nn.Linear(4, 2, bias=False), small) == (8 * 4 + 36 * 2) / 2**30


def test_what_cannot_be_told_of_a_machine_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    found = hardware(CPU)
    assert found["device"] == "cpu"
    assert found["torch"] == torch.__version__
    assert found["cpu_threads"] == torch.get_num_threads()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "gpu" not in found
    assert machine._output("echo", "a card, 2") == "a card, 2"
    assert machine._output("false") is None
    assert machine._output("no-such-command-here") is None
    lines = "processor : 0\nmodel name\t: A chip: fast\nmodel name\t: Another\n"
    for text, name in ((lines, "A chip: fast"), ("processor : 0\n", "by name"), (None, "by name")):
        info = SimpleNamespace(exists=lambda t=text: t is not None, read_text=lambda t=text: t)
        monkeypatch.setattr(machine, "Path", lambda path, info=info: info)
        monkeypatch.setattr("platform.processor", lambda: "by name")
        assert machine._cpu_model() == name
    monkeypatch.setattr("platform.processor", lambda: "")
    assert machine._cpu_model() is None


class Processes:
    """In the place of `multiprocessing`'s: nothing runs, and the hub's CPU is what it is told."""

    def __init__(self, cpu: tuple[float, float], exitcode: int) -> None:
        self.told: list[Any] = []
        self.answers = iter(["address", *cpu])
        self.exitcode = exitcode
        self.begun: list[Any] = []

    def Pipe(self) -> tuple[Any, str]:  # noqa: N802
        def receive() -> Any:
            answer = next(self.answers)
            return ("there", [f"t{n}" for n in range(6)]) if answer == "address" else answer

        return SimpleNamespace(recv=receive, send=self.told.append), "its end"

    def Process(self, target: Any, args: Any, daemon: bool) -> Any:  # noqa: N802
        assert daemon
        start = lambda: self.begun.append((target, args))  # noqa: E731
        return SimpleNamespace(start=start, join=lambda: None, exitcode=self.exitcode)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Processes]:
    def use(*cpu: float, exitcode: int = 0) -> Processes:
        made = Processes((cpu[0], cpu[1]), exitcode)
        monkeypatch.setattr(multiprocessing, "get_context", lambda way: made)
        return made

    return use


def test_a_commit_costs_what_the_hub_used_meanwhile(processes: Callable[..., Processes]) -> None:
    """Six sessions of two fronts, of five chunks each; what it took to start counts for nothing."""
    made = processes(7.0, 13.0)
    assert hub_load.commit_s(11, whole=True, fronts=2, sessions=3, chunks=5) == 6.0 / 30
    assert made.told == ["cpu", "cpu", "end"]
    hub, *fronts = made.begun
    assert hub == (hub_load._hub, ("its end", 6))
    assert fronts == [
        (hub_load._front, ("there", [f"t{n}" for n in own], 11, True, 5))
        for own in ((0, 2, 4), (1, 3, 5))
    ]  # each session is of one front
    processes(0.0, 1.0, exitcode=3)
    with pytest.raises(RuntimeError, match="a front ended with 3"):
        hub_load.commit_s()


def test_placing_and_reports_are_told_of_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """At editors that are three fifths full."""
    reported: list[Any] = []
    times: list[float] = []

    class Noting(hub_load.Placement):
        def __init__(self, scale: Any, clock: Callable[[], float]) -> None:
            self.time = clock
            super().__init__(scale, clock)

        def report(self, editor: Any) -> None:
            reported.append(editor)
            times.append(self.time())
            super().report(editor)

    monkeypatch.setattr(hub_load, "Placement", Noting)
    seconds = iter([8.0, 2.0, 3.0])
    monkeypatch.setattr(hub_load, "_spent", lambda work: (work(), next(seconds))[1])
    assert hub_load.placement_s(2, 6, rounds=4) == {"place": 2.0, "report": 0.5, "decide": 3.0}
    assert [editor.name for editor in reported] == ["e0", "e1"] * 4  # known, four new, known
    assert len(set(times[:6])) == 1
    assert min(times[6:]) > times[0] + EDITOR_GONE_S, "when it decides they have just been heard of"
    for editor in reported[:2]:
        assert [seat.share for seat in editor.streams.values()] == pytest.approx([0.2] * 3)
        assert list(editor.costs.values()) == pytest.approx([0.2 * hub_load.CHUNK_S])
    assert {editor.frame_s for editor in reported[2:6]} == {1e-9}


def test_a_core_holds_as_many_sessions_as_commit_while_one_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def commit(latents: int, *, whole: bool) -> float:
        asked.append((latents, whole))
        return 0.003 if whole else 0.0015

    def place(editors: int, sessions: int) -> dict[str, float]:
        asked.append((editors, sessions))
        return {"place": 1e-4}

    monkeypatch.setattr(hub_load, "commit_s", commit)
    monkeypatch.setattr(hub_load, "placement_s", place)
    hub_load.main()
    assert asked == [(1_200_000, True), (1_200_000, False), (0, False), (100, 1000), (1000, 10000)]
    assert capsys.readouterr().out.splitlines() == [
        "3.6 MB of latents, all sent: 3.00 ms of the hub a commit, 250 sessions a core",
        "3.6 MB of latents, new ones sent: 1.50 ms of the hub a commit, 500 sessions a core",
        "0.0 MB of latents, new ones sent: 1.50 ms of the hub a commit, 500 sessions a core",
        "100 editors, 1000 sessions: place 0.100 ms",
        "1000 editors, 10000 sessions: place 0.100 ms",
    ]
