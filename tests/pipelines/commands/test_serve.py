"""`liveedit serve` as a person runs it: started, used by the command it prints, stopped."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.sync.client import ClientConnection, connect

from data.video import probe, read_frames
from modeling.fingerprint import model_fingerprint
from pipelines.tracking.registry import register
from serve.client import edit_frames, served_model
from serve.run import free_port
from serve.tls import addresses
from tests.pipelines.stages.test_edit_file import frames, write
from tests.processes import command_of
from tests.serve.conftest import clip
from tests.serve.models import save_small_model
from tests.serve.test_robustness import IMAGE, OPEN
from tests.serve.tokens import write_tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent.parent.parent
START_S = 240.0  # a busy machine takes its time
STOP_S = 60.0


class Command:
    """A `liveedit` process in a process group of its own, as a terminal starts one."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.log = folder / "output.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
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

    def interrupt(self) -> None:
        """Ctrl-C in its terminal: to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

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
        *("log_format=json", "log_dir=logs"),
        MLFLOW_TRACKING_URI=registered,
    )
    try:
        yield command
    finally:
        command.end()


@contextmanager
def open_tab(page: str) -> Iterator[ClientConnection]:
    """A page with a live stream: it sends and answers, and never closes."""
    url = page.replace("http", "ws") + "/v1/stream?token=secret"
    with connect(url, subprotocols=["liveedit.v1"], compression=None) as tab:  # type: ignore[list-item]
        tab.send(json.dumps(OPEN | {"mode": "live"}))
        assert json.loads(tab.recv(timeout=60))["type"] == "opened"
        for n in range(9):
            tab.send(struct.pack("<IIQ", n, 0, 0) + IMAGE)
        yield tab


def test_a_registered_model_is_served_streamed_and_stopped(served: Command, tmp_path: Path) -> None:
    page = served.said(r"page +(\S+)")[1]
    client = shlex.split(served.said(r"client +(.+)")[1])
    served.said(r"stop +Ctrl-C")
    assert "<title>" in urllib.request.urlopen(page).read().decode()
    (model,) = json.load(urllib.request.urlopen(f"{page}/v1/models?token=secret"))["models"]
    assert model["name"] == "liveedit version 1"
    assert httpx.get(f"{page}/v1/models?token=wrong").status_code == 401

    write(tmp_path / "IN.mp4", frames(30, 32, 48), Fraction(24))
    arguments = [{"TOKEN": "secret"}.get(word, word) for word in client[1:]]
    edited = subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert edited.returncode == 0, edited.stderr
    assert "OUT.mp4: 30 frames" in edited.stdout
    assert probe(tmp_path / "OUT.mp4").fps == 24
    assert len(list(read_frames(tmp_path / "OUT.mp4"))) == 30

    children = psutil.Process(served.process.pid).children(recursive=True)
    assert len(children) > 5
    with open_tab(page) as tab:
        while isinstance(tab.recv(timeout=60), str):  # until an edited frame: all have come
            pass
        served.interrupt()
        heard = [message for message in tab if isinstance(message, str)]
    assert json.loads(heard[-1]) == {"type": "closed", "frames": 9, "reason": "stopped"}
    assert served.process.wait(STOP_S) == 0, served.log.read_text()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert "Traceback" not in served.log.read_text()
    assert "sessions have 30 s to finish" in served.log.read_text()
    its_logs_say_who_did_what(tmp_path / "logs")


def its_logs_say_who_did_what(folder: Path) -> None:
    """JSON lines, kept, with the fields that an audit asks for, and no token."""
    (file,) = folder.glob("*front*.log")
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    opened = next(line for line in lines if line.get("event") == "opened")
    ended = next(line for line in lines if line.get("event") == "ended")
    for line in (opened, ended):
        assert (line["tenant"], line["client"]) == ("ours", "127.0.0.1")
        assert line["model"] == "liveedit version 1"
        assert len(line["session"]) == 12
    assert (opened["width"], opened["height"], opened["fps"]) == (48, 32, 16.0)
    assert (ended["reason"], ended["frames"], ended["dropped"]) == ("close", 30, 0)
    asked = [(line["path"], line["status"]) for line in lines if line.get("event") == "request"]
    assert ("/v1/models", 401) in asked
    assert ("/readyz", 200) in asked
    text = "".join(path.read_text() for path in folder.rglob("*.log"))
    assert "wrong" not in text
    assert "secret" not in text
    assert "token=" not in text


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A server with a certificate that it made, whose sessions have ten minutes when it is
    stopped."""
    folder = tmp_path_factory.mktemp("secure")
    command = Command(
        folder, "serve", str(save_small_model(folder / "small")), "--port", str(free_port()),
        "--https", "editor_cpus=0.5", "stop_s=600.0", "limits.upload_idle_s=600.0",
    )  # fmt: skip
    try:
        command.said(r"stop +Ctrl-C")
        yield command
    finally:
        command.end()


@pytest.fixture
def trust(secure: Command, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    told = secure.said(r"client +SSL_CERT_FILE=(\S+)")[1]
    monkeypatch.setenv("SSL_CERT_FILE", str(secure.log.parent / told))
    return ssl.create_default_context()


def test_a_server_with_a_certificate_speaks_tls_only(
    secure: Command, trust: ssl.SSLContext
) -> None:
    page = secure.said(r"page +(\S+)")[1]
    stream = secure.said(r"client .+ --url (\S+)")[1]
    assert page.startswith("https://")
    assert stream.startswith("wss://")
    assert served_model(page)["name"] == "small"
    assert "<title>LiveEdit" in httpx.get(page, verify=trust).text
    assert len(list(edit_frames(stream, clip(9), "make it red", fps=16))) == 9
    with pytest.raises(httpx.TransportError):
        httpx.get(page.replace("https", "http"))
    for elsewhere in addresses():  # as a phone would open it
        place = f"https://{elsewhere}:{page.rpartition(':')[2]}"
        assert place in secure.said(r"elsewhere +(.+)")[1]
        assert httpx.get(f"{place}/readyz", verify=trust).status_code == 200
    assert "everybody who reaches this machine may use it" in secure.log.read_text()


def test_a_second_ctrl_c_waits_for_nobody(secure: Command, trust: ssl.SSLContext) -> None:
    """Here for an upload that stands still, which is a session, too."""
    page = secure.said(r"page +(\S+)")[1]
    folder = Path(secure.said(r"logs +(\S+)/session_latest")[1])
    plain = socket.create_connection(("127.0.0.1", int(page.rpartition(":")[2])))
    with plain, trust.wrap_socket(plain, server_hostname="127.0.0.1") as body:
        body.sendall(
            b"POST /v1/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        time.sleep(1)
        secure.interrupt()
        secure.said("sessions have 600 s")
        time.sleep(2)
        assert secure.process.poll() is None
        secure.interrupt()
        secure.process.wait(STOP_S)
    assert not folder.exists()
    assert "Traceback" not in secure.log.read_text()


def test_sigterm_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    command = Command(
        tmp_path, "serve", str(save_small_model(tmp_path / "small")), "--port", str(free_port())
    )
    try:
        process, folder = psutil.Process(command.process.pid), None
        deadline = time.monotonic() + START_S
        while folder is None:
            assert command.process.poll() is None, command.log.read_text()
            assert time.monotonic() < deadline, f"no Ray came:\n{command.log.read_text()}"
            time.sleep(0.1)
            children = process.children(recursive=True)
            lines = "\n".join(" ".join(command_of(child)) for child in children)
            folder = re.search(r"--temp_dir=(\S+)", lines)  # the raylet runs, and nothing else yet
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(STOP_S) != 0
    finally:
        command.end()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert not Path(folder[1]).exists()
    assert "Traceback" not in command.log.read_text()
