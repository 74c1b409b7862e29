"""`liveedit serve` on a Ray cluster that runs already."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from infra.runtime.ray import ClusterError
from serve.client import edit_frames
from serve.run import free_port, start
from serve.settings import ServeSettings
from tests.serve.conftest import clip

pytestmark = pytest.mark.timeout(240)

BIN = Path(sys.executable).parent
PATIENCE_S = 120.0


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray head of its own."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as home:
        head = subprocess.Popen(
            [
                BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--temp-dir={home}",
                "--num-cpus=4", "--node-ip-address=127.0.0.1", "--include-dashboard=false",
                f"--ray-client-server-port={free_port()}",
                f"--dashboard-agent-listen-port={free_port()}",
            ],
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            assert head.stdout is not None
            lines = []
            for line in head.stdout:
                lines.append(line)
                if "Ray runtime started" in line:
                    break
            else:
                pytest.fail(f"no Ray head: {''.join(lines)}")
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(60)


def command(address: str, model: Path, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / "liveedit", "serve", model, "measured_capacity=false", "--port", str(port)],
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_application_joins_a_cluster_and_leaves_nothing_there(
    cluster: str, small_model: Path
) -> None:
    port, other = free_port(), free_port()
    served = command(cluster, small_model, port)
    try:
        assert served.stdout is not None
        assert any("Ctrl-C" in line for line in served.stdout), served.communicate()[1]
        url = f"ws://127.0.0.1:{port}"
        assert len(list(edit_frames(url, clip(21), "make it red", fps=16))) == 21
        # The cluster's ingress is as ours: it compresses nothing.
        protocol = [Subprotocol("liveedit.v1")]
        with connect(f"{url}/v1/stream", subprotocols=protocol) as connection:
            assert connection.protocol.extensions == []

        second = command(cluster, small_model, other)
        _, error = second.communicate(timeout=PATIENCE_S)
        assert second.returncode != 0
        assert f"liveedit runs on 127.0.0.1:{port} of this cluster already" in " ".join(
            error.split()
        )
        assert len(list(edit_frames(url, clip(9), "make it red", fps=16))) == 9
    finally:
        served.send_signal(signal.SIGTERM)
        served.communicate(timeout=PATIENCE_S)
    assert served.returncode == 0
    deadline = time.monotonic() + 30
    while listens(port):
        assert time.monotonic() < deadline, "Serve goes on in the cluster"
        time.sleep(0.2)


def test_a_cluster_that_is_not_there_is_said_at_once(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS={address}: no Ray .*leave RAY_ADDR"):
        start(ServeSettings(str(small_model)), port=free_port())
