"""`liveedit doctor` on this machine, and before a real S3 server."""

from __future__ import annotations

import shutil
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

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
