"""`liveedit serve` as a person runs it: started, used by the command it prints, stopped."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from websockets.sync.client import ClientConnection, connect

from data.video import probe, read_frames
from modeling.fingerprint import model_fingerprint
from pipelines.tracking.registry import register
from serve.run import free_port
from tests.pipelines.stages.test_edit_file import frames, write
from tests.serve.models import save_small_model
from tests.serve.test_robustness import IMAGE, OPEN
from tests.serve.tokens import write_tokens

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parent.parent.parent.parent
START_S = 150.0  # a busy machine takes its time


class Command:
    """A `liveedit` process in a process group of its own, as a terminal starts one."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.log = folder / "output.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environment,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def said(self, pattern: str) -> re.Match[str]:
        """Waits for it."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.log.read_text(), re.MULTILINE):
                return found
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        raise AssertionError(f"{pattern!r} never came:\n{self.log.read_text()}")

    def stop(self) -> int:
        """Ctrl-C in its terminal: to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(60)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def registered(tmp_path: Path, mlflow_uri: str) -> str:
    """A registry whose production model is the small one; returns its address."""
    model = save_small_model(tmp_path / "small")
    from pipelines.tracking.tracker import Tracker

    parent = Tracker.start_pipeline(mlflow_uri, "test", "test", {})
    fingerprint = model_fingerprint(model)
    register(
        mlflow_uri, "liveedit", model,
        run_id=parent.run_id, fingerprint=fingerprint, metrics={}, aliases=("production",),
    )  # fmt: skip
    parent.finish()
    return mlflow_uri


@pytest.fixture
def served(tmp_path: Path, registered: str) -> Iterator[Command]:
    write_tokens(tmp_path / "tokens")
    command = Command(
        tmp_path,
        *("serve", "models:/liveedit@production", "--port", str(free_port())),
        *("token_file=tokens", "editor_cpus=0.5", "limits.max_fps=30"),
        MLFLOW_TRACKING_URI=registered,
    )
    try:
        yield command
    finally:
        command.end()


def test_a_registered_model_is_served_streamed_and_stopped(served: Command, tmp_path: Path) -> None:
    page = served.said(r"page +(\S+)")[1]
    client = shlex.split(served.said(r"client +(.+)")[1])
    folder = Path(served.said(r"logs +(\S+)/session_latest")[1])
    served.said(r"stop +Ctrl-C")
    assert "<title>" in urllib.request.urlopen(page).read().decode()
    (model,) = json.load(urllib.request.urlopen(f"{page}/v1/models?token=secret"))["models"]
    assert model["name"] == "liveedit version 1"

    write(tmp_path / "IN.mp4", frames(30, 32, 48), Fraction(24))
    arguments = [{"TOKEN": "secret"}.get(word, word) for word in client[1:]]
    edited = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert edited.returncode == 0, edited.stderr
    assert "OUT.mp4: 30 frames" in edited.stdout
    assert probe(tmp_path / "OUT.mp4").fps == 24
    assert len(list(read_frames(tmp_path / "OUT.mp4"))) == 30

    children = psutil.Process(served.process.pid).children(recursive=True)
    assert len(children) > 5
    assert served.stop() == 0, served.log.read_text()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert not folder.exists()
    assert "Traceback" not in served.log.read_text()
    assert "stopping; sessions have 30 s to finish" in served.log.read_text()


@contextmanager
def open_tab(page: str) -> Iterator[ClientConnection]:
    """A page with a live stream: it sends and answers, and never closes."""
    url = page.replace("http", "ws") + "/v1/stream"
    with connect(url, subprotocols=["liveedit.v1"], compression=None) as tab:  # type: ignore[list-item]
        tab.send(json.dumps(OPEN | {"mode": "live"}))
        assert json.loads(tab.recv(timeout=60))["type"] == "opened"
        for n in range(9):
            tab.send(struct.pack("<IIQ", n, 0, 0) + IMAGE)
        yield tab


def test_an_open_tab_hears_of_the_stop(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "small")
    command = Command(tmp_path, "serve", str(model), "--port", str(free_port()), "editor_cpus=0.5")
    try:
        page = command.said(r"page +(\S+)")[1]
        folder = Path(command.said(r"logs +(\S+)/session_latest")[1])
        command.said(r"stop +Ctrl-C")
        with open_tab(page) as tab:
            while isinstance(tab.recv(timeout=60), str):  # until an edited frame: all have come
                pass
            os.killpg(command.process.pid, signal.SIGINT)
            heard = [message for message in tab if isinstance(message, str)]
        assert json.loads(heard[-1]) == {"type": "closed", "frames": 9, "reason": "stopped"}
        assert command.process.wait(60) == 0, command.log.read_text()
    finally:
        command.end()
    assert not folder.exists()
    assert "Traceback" not in command.log.read_text()


def test_a_second_ctrl_c_waits_for_nobody(tmp_path: Path) -> None:
    """An upload that stands still is a session, too, and it has ten minutes."""
    model = save_small_model(tmp_path / "small")
    command = Command(
        tmp_path, "serve", str(model), "--port", str(free_port()), "editor_cpus=0.5",
        "stop_s=600.0", "limits.upload_idle_s=600.0",
    )  # fmt: skip
    try:
        page = command.said(r"page +(\S+)")[1]
        folder = Path(command.said(r"logs +(\S+)/session_latest")[1])
        command.said(r"stop +Ctrl-C")
        body = socket.create_connection(("127.0.0.1", int(page.rpartition(":")[2])))
        with body:
            body.sendall(
                b"POST /v1/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            )
            time.sleep(1)
            os.killpg(command.process.pid, signal.SIGINT)
            command.said("stopping; sessions have 600 s")
            time.sleep(2)
            assert command.process.poll() is None
            os.killpg(command.process.pid, signal.SIGINT)
            command.process.wait(15)
    finally:
        command.end()
    assert not folder.exists()
    assert "Traceback" not in command.log.read_text()


def test_weights_that_no_editor_can_load_are_named(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "small")
    config = json.loads((model / "config.json").read_text())
    config["transformer"]["num_layers"] += 1
    (model / "config.json").write_text(json.dumps(config))
    command = Command(tmp_path, "serve", str(model), "--port", str(free_port()))
    try:
        assert command.process.wait(START_S) == 1
    finally:
        command.end()
    said = command.log.read_text()
    assert "does not fit its config.json: missing blocks.2" in said
    assert said.count("\n") == 1
    kept = re.search(r"logs are in (\S+)/session_latest", said)
    assert kept
    shutil.rmtree(kept[1])


def test_sigterm_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    command = Command(
        tmp_path, "serve", str(save_small_model(tmp_path / "small")), "--port", str(free_port())
    )
    try:
        process, folder = psutil.Process(command.process.pid), None
        while folder is None:
            assert command.process.poll() is None, command.log.read_text()
            time.sleep(0.1)
            children = process.children(recursive=True)
            lines = "\n".join(" ".join(child.cmdline()) for child in children)
            folder = re.search(r"--temp_dir=(\S+)", lines)  # the raylet runs, and nothing else yet
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(60) != 0
    finally:
        command.end()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert not Path(folder[1]).exists()
    assert "Traceback" not in command.log.read_text()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "small")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = Command(tmp_path, "serve", str(model), "--port", str(port))
        assert command.process.wait(60) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in command.log.read_text()
