"""A start of Ray that does not hear that it shall stop ends all the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

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
