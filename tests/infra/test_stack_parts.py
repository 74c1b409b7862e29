"""The parts of the local stack that need none of its servers: keys, files, ports, ends."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest
import yaml

from infra.stack import servers, up
from infra.stack.servers import Server, Settings
from infra.stack.up import StackError, StackProcess

GENTLE = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def end(*_):
    time.sleep(0.1)
    (folder / "ended").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
(folder / "begun").touch()
time.sleep(60)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, "10.0.0.7:8123", mlflow=1, s3=2, prometheus=3, grafana=4)


def test_a_stores_key_is_made_once_and_is_its_users_alone(settings: Settings) -> None:
    """What was kept is read with it."""
    settings.prepare()
    first = settings.secret_key
    settings.prepare()
    assert settings.secret_key == first
    assert len(first) == 40
    for file in (settings.data / "s3-secret-key", settings.environment_file):
        assert file.stat().st_mode & 0o777 == 0o600
    assert f"export AWS_SECRET_ACCESS_KEY={first}\n" in settings.environment_file.read_text()


def test_prometheus_watches_the_application_that_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one of the containers, whose file lies beside."""
    monkeypatch.setattr(servers.shutil, "which", lambda name: name)
    part = servers.prometheus(settings)
    assert isinstance(part, Server)
    folder = settings.data / "prometheus"
    targets = yaml.safe_load((folder / "targets.yml").read_text())
    assert targets == [{"targets": ["10.0.0.7:8123"]}]
    assert {file.name for file in folder.iterdir()} >= {"prometheus.yml", "alerts.yml"}
    assert f"--config.file={folder / 'prometheus.yml'}" in part.command


def test_a_part_whose_port_is_taken_is_not_started(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = settings.data / "begun"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-c", GENTLE, str(settings.data)]
        part = Server("s3", port, "", f"http://127.0.0.1:{port}", command, {})
        monkeypatch.setattr(up, "SERVERS", (lambda _: part,))
        monkeypatch.setattr(up.signal, "signal", lambda *_: None)
        with pytest.raises(StackError, match=rf"port {port} is taken .*--s3 PORT"):
            up.run(settings)
    assert not begun.exists()
    assert not (settings.data / "logs").exists()


def test_a_part_has_its_time_to_end_by_itself(settings: Settings) -> None:
    """A database writes what it holds."""
    command = [sys.executable, "-c", GENTLE, str(settings.data)]
    process = StackProcess(Server("x", 1, "", "", command, {}), settings)
    deadline = time.monotonic() + 60
    while not (settings.data / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.stop()
    assert (settings.data / "ended").exists()
    assert process.process.returncode == 0
