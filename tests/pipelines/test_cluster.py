"""What works on a Ray cluster that runs already: pairs, encoding, `liveedit serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from data.ingest import ingest
from data.loader import Split, loader
from data.manifest import dataset_hash, read_dataset_info
from infra.runtime.ray import ClusterError
from pipelines.config.merge import ConfigError
from pipelines.config.stages import ComputeConfig
from pipelines.stages.encode import encode_dataset
from pipelines.stages.ingest import on_ray
from pipelines.training.cluster import check_folder_is_shared, ray_session
from serve.client import edit_frames
from serve.run import free_port, start
from serve.settings import ServeSettings
from tests.data.test_ingest import make_list, pairs
from tests.data.workers import crash_at_five
from tests.serve.conftest import clip
from tests.serve.models import save_small_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
PATIENCE_S = 240.0  # a busy machine takes its time


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
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
            # A token in the home of who runs the tests would make it ask for one.
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
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


def test_pairs_are_ingested_there(tmp_path: Path, cluster: str) -> None:
    path = make_list(tmp_path, 5, bad=(3,))
    here, _ = ingest(pairs(path), str(tmp_path / "here"), samples_per_shard=2)
    arguments = ["--frames", "9", "--size", "48x32", "--samples-per-shard", "2"]
    run = subprocess.run(
        [BIN / "liveedit", "data", "ingest", path, "there", *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            "RAY_ADDRESS": cluster,
            # As in a job that was submitted with --working-dir.
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"working_dir": str(BIN)}}),
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 0, run.stderr
    said = " ".join(run.stdout.split())
    assert f"5 pairs on 4 cores of the Ray cluster at {cluster}" in said
    assert "gone.mp4: no such file" in said
    there = read_dataset_info(str(tmp_path / "there"))
    assert dataset_hash(there) == dataset_hash(here)


def test_its_tasks_survive_a_crash_and_encode_the_same(
    tmp_path: Path,
    cluster: str,
    tiny_model: Path,
    heldout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    seen: list[int] = []

    def encode(encoded: str, **settings: Any) -> None:
        encode_dataset(
            heldout, encoded, tiny_model, batch_size=1, samples_per_shard=2, gpus=False, **settings
        )

    encode(here, threads=2)
    with ray_session(ComputeConfig(address=cluster)):
        work = partial(on_ray, window=4)
        results = work(crash_at_five, range(8), crashed=lambda item: -item)  # type: ignore[arg-type, misc]
        assert list(results) == [n * n if n != 5 else -5 for n in range(8)]
        encode(there, tasks=2, on_sample=lambda done, total: seen.append(done))

        monkeypatch.chdir(tmp_path)
        compute = ComputeConfig(address=cluster)
        check_folder_is_shared(tmp_path / "runs", compute)
        mine = Path("/proc/self/cwd/runs")  # a folder that no other process sees
        here_only = f"output={mine} .*{socket.gethostname()} .*: No such file.*shared disk"
        with pytest.raises(ConfigError, match=here_only):
            check_folder_is_shared(mine, compute, late_s=0)
        assert not list((tmp_path / "runs").iterdir())
    assert seen == [1, 2]
    batches = zip(
        *(loader(uri, Split(batch_size=2, shuffle=False, epochs=1)) for uri in (here, there)),
        strict=True,
    )
    for a, b in batches:
        assert a["instruction"] == b["instruction"]
        for name in ("source", "target", "text"):
            assert torch.allclose(a[name], b[name], atol=2e-3)  # threads sum in another order


def test_weights_that_no_editor_can_load_are_named(tmp_path: Path, cluster: str) -> None:
    model = save_small_model(tmp_path / "small")
    config = json.loads((model / "config.json").read_text())
    config["transformer"]["num_layers"] += 1
    (model / "config.json").write_text(json.dumps(config))
    served = command(cluster, model, free_port())
    _, error = served.communicate(timeout=PATIENCE_S)
    assert served.returncode == 1
    said = error.splitlines()[-1]  # after what Ray warns of
    assert "the application did not start: " in said
    assert "does not fit its config.json: missing blocks.2" in said
    assert "Traceback" not in error


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
