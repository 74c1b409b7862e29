"""A start of Ray that does not hear that it shall stop ends all the same."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from infra.runtime import ray

# What Ray's own code does now and then: no handler has an effect while it waits.
DEAF = """
    import signal, subprocess, sys, time
    from pathlib import Path
    from infra.runtime import ray

    ray.STUCK_S = 1.0
    folder = Path(sys.argv[1])
    signal.signal(int(sys.argv[2]), lambda *_: None)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)", str(folder)]
    child = subprocess.Popen(sleeper)
    with ray._stopped_in_time(folder):
        print(child.pid, flush=True)
        for _ in range(int(sys.argv[3])):
            time.sleep(0.1)
    child.kill()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ticks", [300, 1])
def test_a_start_that_does_not_hear_ends_with_what_it_started(
    tmp_path: Path, number: signal.Signals, ticks: int
) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    code = textwrap.dedent(DEAF)
    deaf = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(int(number)), str(ticks)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert deaf.stdout is not None
    child = psutil.Process(int(deaf.stdout.readline()))
    deaf.send_signal(number)
    _, said = deaf.communicate(timeout=30)
    if ticks == 1:  # it heard, or was done: all goes its way
        assert (deaf.returncode, said) == (0, "")
        assert folder.exists()
    else:
        assert deaf.returncode == 128 + number
        assert f"did not hear signal {int(number)}" in said
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert not folder.exists()


def test_signals_are_theirs_again_whose_they_were(tmp_path: Path) -> None:
    theirs, _ = pair = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())

    def start() -> int:
        with ray._stopped_in_time(tmp_path):
            return signal.set_wakeup_fd(-1) if main() else -2

    def main() -> bool:
        return threading.current_thread() is threading.main_thread()

    try:
        assert start() not in (-1, theirs.fileno())
        assert signal.set_wakeup_fd(theirs.fileno()) == theirs.fileno()
        with ThreadPoolExecutor(1) as pool:  # whose signals they are not
            assert pool.submit(start).result() == -2
        assert signal.set_wakeup_fd(before) == theirs.fileno()
    finally:
        signal.set_wakeup_fd(before)
        for end in pair:
            end.close()


@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_started_while_a_ray_ends_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """By what was to be ended itself; at the next look there may be nobody, and then again one."""
    sleepers = [psutil.Popen(["sleep", "60"]) for _ in range(3)]
    looks = iter([{sleepers[0]}, {sleepers[1]}, {sleepers[2]}])
    monkeypatch.setattr(ray, "_processes", lambda folder: next(looks, set()))
    monkeypatch.setattr(ray, "END_S", 0.05)
    monkeypatch.setattr(ray.os, "_exit", lambda code: None)
    try:
        if at_once:
            ray._end_at_once(tmp_path / "ray", signal.SIGTERM)
        else:
            ray._shutdown(tmp_path / "ray")
        assert [sleeper.poll() for sleeper in sleepers] == [-signal.SIGKILL] * 3
    finally:
        for sleeper in sleepers:
            if sleeper.poll() is None:
                sleeper.kill()
                sleeper.wait()
