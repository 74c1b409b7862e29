"""How long a part of the local stack is waited for, and what is left of one that does not end by
itself: nothing."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from infra.stack import servers, up
from infra.stack.servers import Server, Settings
from infra.stack.up import StackError, StackProcess
from tests.processes import port_just_left

STUBBORN = """
import signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[1], "child.new").write_text(str(child.pid))
Path(sys.argv[1], "child.new").rename(Path(sys.argv[1], "child"))
time.sleep(60)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, "localhost:8000", mlflow=1, s3=2, prometheus=3, grafana=4)


def test_a_grafana_that_is_a_link_on_the_path_is_at_home_where_it_lies(tmp_path: Path) -> None:
    for name in ("path", "grafana/bin", "grafana/conf"):
        (tmp_path / name).mkdir(parents=True)
    binary, link = tmp_path / "grafana" / "bin" / "grafana", tmp_path / "path" / "grafana"
    for file in (binary, tmp_path / "grafana" / "conf" / "defaults.ini"):
        file.touch()
    link.symlink_to(binary)
    assert servers._grafana_home(link) == tmp_path / "grafana"


def test_a_port_that_a_server_had_a_moment_ago_is_free() -> None:
    """Its connections wait for stragglers for a minute; who restarts the stack does not."""
    up._check_port(Server("x", port_just_left(), "", "", [], {}))


@pytest.mark.parametrize("code", [0, 1])
def test_a_database_is_made_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path, unfinished = tmp_path / "mlflow.db", tmp_path / "mlflow.unfinished"
    unfinished.write_text("of a start that was interrupted")

    def make(command: list[str], **_: Any) -> Any:
        assert not unfinished.exists()
        assert command[-1] == f"sqlite:///{unfinished}"
        unfinished.write_text("made")
        return SimpleNamespace(returncode=code, stderr="traceback\nno such table\n")

    monkeypatch.setattr(servers.subprocess, "run", make)
    if code:
        with pytest.raises(OSError, match=rf"cannot make its database {path}: no such table$"):
            servers._make_database(path)
        assert not path.exists()
    else:
        servers._make_database(path)
        assert path.read_text() == "made"
        assert not unfinished.exists()


@pytest.mark.parametrize(("late", "taken"), [(119.0, True), (121.0, False)])
def test_a_part_has_two_minutes_to_answer(
    settings: Settings, late: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow makes its tables and imports half of Python, on a machine that starts the others."""
    now = 1000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    process = StackProcess(Server("x", 1, "", "http://x", command, {}), settings)
    with monkeypatch.context() as patched:
        patched.setattr(up, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
        patched.setattr(up, "_answers", lambda url: now >= 1000.0 + late)
        if taken:
            process.wait_ready()
        else:
            with pytest.raises(StackError, match="does not answer at http://x after 120 s"):
                process.wait_ready()
    process.stop()


def test_a_part_that_ignores_its_end_is_killed_with_all_that_it_started(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that outlives its server holds the port of the next start."""
    monkeypatch.setattr(up, "STOP_S", 0.2)
    command = [sys.executable, "-S", "-c", STUBBORN, str(tmp_path)]
    process = StackProcess(Server("x", 1, "", "", command, {}), settings)
    deadline = time.monotonic() + 60
    while not (tmp_path / "child").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    process.stop()
    assert process.process.returncode == -9
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not [left for left in alive if left.status() != psutil.STATUS_ZOMBIE]
