from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.processes import _submit, adopt_environment, map_in_order, worker_context
from infra.runtime.environment import become, everything

ROOT = Path(__file__).parent.parent.parent
TERMINAL = (signal.SIGINT, signal.SIGHUP)


def test_a_worker_has_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that workers are forked from is as old as the first of them."""
    context = worker_context()
    assert context.get_start_method() == "forkserver"
    for value in ("first", "second"):
        monkeypatch.setenv("LIVEEDIT_SEEN", value)
        with context.Pool(1, adopt_environment, (dict(os.environ),)) as pool:
            assert pool.apply(os.getenv, ("LIVEEDIT_SEEN",)) == value
    monkeypatch.delenv("LIVEEDIT_SEEN")
    with context.Pool(1, adopt_environment, (dict(os.environ), 0)) as pool:
        assert pool.apply(os.getenv, ("LIVEEDIT_SEEN",)) is None


def test_a_worker_has_no_variable_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEEDIT_GONE", "yes")
    before = everything()
    try:
        adopt_environment({"LIVEEDIT_SEEN": "now"})
        assert everything() == {"LIVEEDIT_SEEN": "now"}
    finally:
        become(before)


def blocked(pid: int) -> set[signal.Signals]:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    return {number for number in TERMINAL if mask >> (number - 1) & 1}


def its_own_and_its_server_s(_: int) -> tuple[int, set[signal.Signals], set[signal.Signals]]:
    return os.getppid(), blocked(os.getpid()), blocked(os.getppid())


def test_ctrl_c_is_the_parent_s_alone_to_hear() -> None:
    """A terminal sends it to all; one that interrupts the server's imports ends all workers."""
    ((server, ours, its),) = map_in_order(its_own_and_its_server_s, [0], 1)
    assert server != os.getpid()
    assert ours == its == set(TERMINAL)
    assert blocked(os.getpid()) == set()


def touch_late(path: Path) -> None:
    if path.name != "first":
        time.sleep(20)
    path.touch()


def test_who_stops_asking_waits_for_nothing_under_way(tmp_path: Path) -> None:
    results = map_in_order(touch_late, [tmp_path / "first", tmp_path / "late"], 1)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("ending", [*TERMINAL, signal.SIGTERM])
def test_a_start_is_whole_before_an_ending_is_heard(ending: signal.Signals) -> None:
    """Half of one would be a worker that nobody ends. Any thread may be given what ends all."""

    class Pool:
        started = False

        def submit(self, *_: object) -> None:
            os.kill(os.getpid(), ending)
            time.sleep(0.1)  # for the thread to take it
            self.started = True

    pool: Any = Pool()
    over = threading.Event()
    idle = threading.Thread(target=over.wait)
    idle.start()
    before = signal.signal(ending, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _submit(pool, abs, 1)
        assert signal.getsignal(ending) is signal.default_int_handler
    finally:
        signal.signal(ending, before)
        over.set()
        idle.join()
    assert pool.started
    assert blocked(os.getpid()) == set()


def dies_while_it_sends(number: int) -> int:
    if number == 1:

        def half(self: Any, message: bytes) -> None:
            os.write(self.fileno(), bytes(message)[: len(message) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        multiprocessing.connection.Connection._send = half  # type: ignore[attr-defined]
    return number


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_while_it_sends_takes_its_item_alone_along() -> None:
    """The pool waits for the rest of what it sent, which the others and itself might be sending."""
    results = map_in_order(dies_while_it_sends, range(3), 2, crashed=lambda number: -number)
    assert list(results) == [0, -1, 2]


FOR_EVER = """
import os, time
from data.processes import map_in_order

def work(number):
    if number:
        time.sleep(600)
    return os.getpid()

if __name__ == "__main__":
    for pid in map_in_order(work, [0, 1], 1):
        print(pid, flush=True)
"""


@pytest.mark.slow
def test_a_worker_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FOR_EVER)
    with subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        worker = psutil.Process(int(process.stdout.readline()))
        process.kill()
    try:
        worker.wait(60)
    finally:
        if worker.is_running():
            worker.kill()
