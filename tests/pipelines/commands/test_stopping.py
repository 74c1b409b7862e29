"""Commands as processes of their own that are stopped, end or fail: what they say and leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data.manifest import read_dataset_info
from data.video import VideoWriter

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP])
def test_a_stopped_edit_leaves_nothing_and_no_traceback(
    tmp_path: Path, tiny_model: Path, stop: signal.Signals
) -> None:
    """Also when the signal comes three times, as from impatient fingers."""
    with VideoWriter(tmp_path / "in.mp4", 64, 48, 16, preset="ultrafast") as writer:
        for _ in range(30):
            writer.write(np.zeros((100, 48, 64, 3), np.uint8))
    command = [sys.executable, "-m", "pipelines", "edit", "in.mp4", "out.mp4", "-p", "x"]
    with subprocess.Popen(
        [*command, "--model", str(tiny_model)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, stop, signal.SIG_DFL),  # nohup, above pytest, ignores it
    ) as process:
        try:
            while not list(tmp_path.glob(".out*")):
                assert process.poll() is None
                time.sleep(0.05)
            for _ in range(3):
                process.send_signal(stop)
                time.sleep(0.05)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_exit_with_130(tmp_path: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "pipelines", "data", "make", "pairs"]
    command += ["--pairs", "5000", "--size", "32x32", "--frames", "9", "--samples-per-shard", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            while not list(tmp_path.glob("pairs/*.tar")):
                assert process.poll() is None
                time.sleep(0.1)
            if stop is signal.SIGINT:
                os.killpg(process.pid, stop)  # as a terminal does: to the whole group
            else:
                process.send_signal(stop)
            assert process.wait(60) == 130
            assert process.stderr is not None
            assert process.stderr.read() == b"\nStopping.\n"
        finally:
            process.kill()
    with pytest.raises(ValueError, match=r"cut off while being written|no dataset"):
        read_dataset_info(str(tmp_path / "pairs"))


def test_ctrl_c_in_the_midst_of_imports_is_said_as_later(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "pipelines", "data", "make", "pairs"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.endswith(" typer.colors\n"):  # the first of typer
                process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert line == "Stopping.\n"


ENDS = """
import atexit, sys
import pipelines.cli
from pipelines.__main__ import main

class Torch:
    def __del__(self):
        print("taken apart")

torch = Torch()

def command():
    atexit.register(print, "put away")
    sys.exit(3)

pipelines.cli.main = command
main()
"""


def test_a_command_puts_away_what_it_has_and_leaves_the_rest_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, "put away\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("debug", ["0", "1"])
def test_traceback_is_for_those_who_ask(tmp_path: Path, debug: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pipelines", "data", "check", "nowhere"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LIVEEDIT_DEBUG": debug},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert ("Traceback" in result.stderr) == (debug == "1")
    assert "nowhere: no dataset here" in result.stderr
