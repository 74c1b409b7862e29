"""Whether memory is flat, by numbers written by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from infra.runtime.errors import UserError
from pipelines.bench import soak
from pipelines.bench.serve import at_random, memory_table, parse_attacks, soak_line
from pipelines.bench.soak import LEAST, HeldMemory, processes, seconds_of
from serve.client.attacks import ATTACKS
from serve.client.cameras import BenchReport, CameraLoad, CameraReport
from tests.pipelines.bench.test_figures import shown

MIB = 2**20


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400)])
def test_a_time_is_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["30", "m", "0s", "-1s", "30 m", "1d", "nans"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--soak {text} must be a time, such as 90s, 30m or 2h"):
        seconds_of(text)


def held(first: int, last: int, *, warm: int = 0) -> HeldMemory:
    """A process that holds `warm` for 20 s, then `first`, and from the middle on `last`."""
    memory = HeldMemory()
    for second in range(101):
        memory.add("hub 7", second, warm if second < 20 else first if second < 60 else last)
    return memory


@pytest.mark.parametrize(
    ("first", "last", "flat"),
    [
        (1000, 1020, True),
        (1000, 1021, False),
        (1000, 500, True),  # it gave back
        (100, 108, True),  # a few megabytes are the allocator's
        (100, 109, False),
    ],
)
def test_what_grows_by_more_than_two_percent_is_not_flat(first: int, last: int, flat: bool) -> None:
    (row,) = held(first * MIB, last * MIB, warm=1).growth()
    assert (row["process"], row["first"], row["last"]) == ("hub 7", first * MIB, last * MIB)
    assert row["flat"] is flat
    view = memory_table([row])
    assert [str(c.header) for c in view.columns] == [
        "", "first third", "last third", "grown", "flat",
    ]  # fmt: skip
    assert [next(iter(c.cells)) for c in view.columns[1:3]] == [f"{first}", f"{last}"]
    text = shown(view)
    assert "hub 7" in text
    assert f"{100 * (last / first - 1):+.1f} %" in text
    assert ("yes" if flat else "no") in text


def test_a_short_peak_is_no_growth_and_who_came_late_is_not_compared() -> None:
    memory = held(1000 * MIB, 1000 * MIB)
    memory.add("hub 7", 100.5, 9000 * MIB)
    memory.add("front 8", 99.0, LEAST)
    assert [row["flat"] for row in memory.growth()] == [True]


def test_processes_are_found_by_what_ray_calls_them() -> None:
    """Of this process's children, and theirs; Ray writes it over their command line."""
    code = "import time; time.sleep(60)"
    names = ("ray::ServeReplica:liveedit:front", "ray::Hub", "ray::ProxyActor.receive", "other")
    below = (
        f"subprocess.run(['ray::ServeController', '-c', {code!r}], executable={sys.executable!r})"
    )
    codes = [code, code, code, f"import subprocess; {below}"]
    children = [
        subprocess.Popen([name, "-c", does], executable=sys.executable)
        for name, does in zip(names, codes, strict=True)
    ]
    try:
        deadline = time.monotonic() + 20
        while len(found := processes()) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for process in found.values():
            process.kill()
        for child in children:
            child.kill()
            child.wait()
    kinds = ("front", "hub", "proxyactor")
    pids = (child.pid for child in children)
    own = {f"{kind} {pid}" for kind, pid in zip(kinds, pids, strict=False)}
    assert [name.split()[0] for name in set(found) - own] == ["servecontroller"]
    assert own < set(found)


def test_each_process_is_sampled_for_itself_whoever_ends_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it holds in memory (not what it may address), and when since the beginning."""
    now = [0.0]
    monkeypatch.setattr(soak.time, "monotonic", lambda: now[0])
    held = {"editor 1": 100, "front 2": None, "hub 3": 300}

    def process(name: str) -> Any:
        def memory() -> Any:
            if held[name] is None:
                raise psutil.NoSuchProcess(2)
            return SimpleNamespace(rss=held[name], vms=7)

        return SimpleNamespace(memory_info=memory)

    monkeypatch.setattr(soak, "processes", lambda: {name: process(name) for name in held})
    memory = HeldMemory(began=50.0)
    now[0] = 54.0
    memory.sample()
    held["editor 1"] = 200
    now[0] = 60.0
    memory.sample()
    assert memory.seconds == 10.0
    assert memory.samples == {
        "editor 1": [(4.0, 100), (10.0, 200)], "hub 3": [(4.0, 300), (10.0, 300)],
    }  # fmt: skip


def test_who_ends_while_it_is_looked_at_hides_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(pid: int, *words: str) -> Any:
        def command() -> list[str]:
            if not words:
                raise psutil.NoSuchProcess(pid)
            return list(words)

        return SimpleNamespace(pid=pid, cmdline=command)

    all_of_us = [child(1), child(2, "ray::Hub"), child(3, "python"), child(4, "ray::ProxyActor")]
    ours = SimpleNamespace(children=lambda recursive: all_of_us if recursive else [])
    monkeypatch.setattr(soak.psutil, "Process", lambda: ours)
    assert list(processes()) == ["hub 2", "proxyactor 4"]


def test_all_runs_of_a_soak_count() -> None:
    camera = CameraReport(sent=10, edited=7, dropped=2, lost=1)
    fine = CameraReport(sent=5, edited=5)
    broken = CameraReport(error="at_capacity")
    runs = [
        BenchReport(CameraLoad(), cameras, 0, 1.0, [], []).to_dict()
        for cameras in ([camera, fine], [fine, broken])
    ]
    assert soak_line(runs) == (
        "soak: 2 runs, frames: 20 sent, 17 edited, 2 dropped, 1 lost, 0 repeated; "
        "errors: at_capacity"
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [(None, []), ("", []), ("all", list(ATTACKS)), (", ".join(ATTACKS), list(ATTACKS))],
)
def test_attacks_are_chosen_by_name(text: str | None, names: list[str]) -> None:
    assert parse_attacks(text) == names
    with pytest.raises(UserError, match=f"--attack none is none; there are {next(iter(ATTACKS))}"):
        parse_attacks(f"{next(iter(ATTACKS))},none")


def test_chaos_kills_all_kinds_and_the_same_ones_each_time() -> None:
    drawn = list(itertools.islice(at_random(), 60))
    assert drawn == list(itertools.islice(at_random(), 60))
    assert all(drawn.count(kind) > 10 for kind in ("front", "editor", "hub"))
    assert soak.FLAT == 0.02
