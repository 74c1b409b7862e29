"""`liveedit doctor` on this machine, and before a real S3 server."""

from __future__ import annotations

import errno
import shutil
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.commands import doctor
from tests.data.conftest import SECRET_KEY, point_at, start_s3
from tests.pipelines.commands.entry import Liveedit


class KeysThatMayNotList(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"<Error><Code>AccessDenied</Code></Error>")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_port_that_is_taken_is_told(liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        healthy = liveedit("doctor", "--port", str(port))
        assert healthy.returncode == 0, healthy.stdout
        assert f"port {port}" in healthy.stdout
        assert "something listens there" in healthy.stdout


def test_what_is_missing_hides_nothing_else(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # whose import then fails
    monkeypatch.setattr(
        doctor, "version", lambda name: version("no such package" if name == "torch" else name)
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_text("no database, but long enough to be one" * 9)
    ill = liveedit("doctor")
    assert ill.returncode == 1
    said = [line.split(maxsplit=2) for line in ill.stdout.splitlines() if line.startswith("  ")]
    found = {name: (state, what) for state, name, what in said}
    assert found["torch"] == (
        "broken",
        "not installed, so no training and no editing; run `make venv`",
    )
    assert found["GPU"][0] == "broken"
    assert found["MLflow"][0] == "broken"
    assert "mlflow.db cannot be opened" in found["MLflow"][1]
    assert found["git"] == ("absent", "not found: no commits in records")
    assert {name for name, (state, _) in found.items() if state == "broken"} == {
        *("torch", "GPU", "MLflow")
    }


@pytest.mark.parametrize(
    ("error", "state", "told"),
    [
        (None, "ok", "Triton's and NVRTC's are compiled"),
        (RuntimeError("no\ncompiler"), "broken", "RuntimeError: no"),
    ],
)
def test_every_gpu_is_named_and_whether_kernels_can_be_made_for_it(
    error: Exception | None, state: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [
        SimpleNamespace(name=name, total_memory=gib * 2**30, major=major, minor=n)
        for n, (name, gib, major) in enumerate((("A card", 80, 9), ("Another", 24, 8)))
    ]
    loads: list[str] = []

    def load(model: str, *, device: str) -> None:
        loads.append(device)
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr("modeling.editor.StreamingEditor.load", load)
    assert [(f.name, f.state, f.what) for f in doctor._gpus()] == [
        ("GPU 0", "ok", "A card, 80 GiB, capability 9.0"),
        ("GPU 1", "ok", "Another, 24 GiB, capability 8.1"),
        ("kernels", state, told),
    ]
    assert loads == ["cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [(f.name, f.state) for f in doctor._gpus()] == [("GPU", "absent")]


def test_a_port_that_nobody_may_use_is_not_one_that_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(number: int) -> Any:
        class Socket(socket.socket):
            def bind(self, address: Any) -> None:
                raise OSError(number, "a reason")

        return Socket

    monkeypatch.setattr(doctor.socket, "socket", refuse(errno.EADDRINUSE))
    assert doctor._obstacle(81) == "something listens there"
    monkeypatch.setattr(doctor.socket, "socket", refuse(errno.EACCES))
    assert doctor._obstacle(81) == "not allowed here (a reason)"


@pytest.mark.parametrize(
    ("release", "state"), [((3, 10, 9), "broken"), ((3, 11), "ok"), ((3, 12, 1), "ok")]
)
def test_an_old_python_is_told(
    release: tuple[int, ...], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", release)
    first = next(iter(doctor._packages()))
    assert (first.name, first.state) == ("Python", state)
    assert first.what.endswith("needs 3.11") == (state == "broken")


def test_doctor_asks_s3_whether_it_takes_the_keys(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = start_s3(tmp_path)
    try:
        for secret, code, told in (
            (SECRET_KEY, 0, f"{server.endpoint} answers, and these keys open 1 buckets"),
            ("wrong", 1, "S3: access denied (The request signature we calculated does not match"),
            (None, 1, "S3: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ):
            point_at(server.endpoint, monkeypatch, secret=secret)
            result = liveedit("doctor")
            assert told in result.stdout
            assert result.returncode == code
    finally:
        server.process.terminate()
        server.process.wait(10)
    with HTTPServer(("127.0.0.1", 0), KeysThatMayNotList) as aws:
        threading.Thread(target=aws.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{aws.server_port}"
        point_at(endpoint, monkeypatch)
        assert "answers, and these keys may not list buckets" in liveedit("doctor").stdout
        aws.shutdown()
    point_at(endpoint, monkeypatch)
    ill = liveedit("doctor")
    assert ill.returncode == 1
    assert f"S3 at {endpoint} does not answer as it should (EndpointConn" in ill.stdout
    assert "s3:// datasets cannot be read" in ill.stdout
