from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.processes import _submit, adopt_environment, map_in_order, worker_context

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


ENDS = """
import time
from data.processes import map_in_order

def large(item):
    time.sleep(0.005)
    return bytes(5_000_000)

if __name__ == "__main__":
    for _ in range(3):
        results = map_in_order(large, range(100), 2)
        next(results)
        results.close()
"""


def test_who_stops_asking_does_not_wait_for_the_rest_of_half_a_result(tmp_path: Path) -> None:
    """Workers that are killed while they send hung the pool, and then the interpreter's end."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=60)


def test_a_start_is_whole_before_ctrl_c_is_heard() -> None:
    """Half of one would be a worker that nobody ends."""

    class Pool:
        started = False

        def submit(self, *_: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            self.started = True

    pool: Any = Pool()
    with pytest.raises(KeyboardInterrupt):
        _submit(pool, abs, 1)
    assert pool.started


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
