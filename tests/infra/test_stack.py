"""The local stack, started for real."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import s3fs

from infra.stack import servers
from serve.run import free_port
from tests.infra.test_monitoring import EXPRESSIONS
from tests.processes import command_of
from tests.serve.conftest import serving
from tests.serve.models import save_small_model

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NAMES = ("mlflow", "s3", "prometheus", "grafana")


@dataclass
class Stack:
    process: subprocess.Popen[str]
    ports: dict[str, int]
    data: Path
    output: str


def start(data: Path, *, application: str = "127.0.0.1:9") -> Stack:
    ports = {name: free_port() for name in NAMES}
    command = [sys.executable, "-u", "-m", "infra.stack.up", f"--data={data}"]
    command += [f"--application={application}", *(f"--{n}={port}" for n, port in ports.items())]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("Ctrl-C"):
            return Stack(process, ports, data, output)
    raise AssertionError(f"the stack ended with {process.wait()}: {output}")


def interrupt(stack: Stack) -> None:
    """Ctrl-C; everything that it had started must be gone when it ends."""
    children = psutil.Process(stack.process.pid).children(recursive=True)
    assert children
    stack.process.send_signal(signal.SIGINT)
    output, _ = stack.process.communicate(timeout=60)
    assert stack.process.returncode == 0, output
    assert str(stack.data) in output
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack beside a server that it watches; stopped with Ctrl-C."""
    folder = tmp_path_factory.mktemp("stack")
    with serving(save_small_model(folder / "small")) as server:
        started = start(folder / "data", application=f"127.0.0.1:{server.port}")
        yield started
        interrupt(started)


def exported(stack: Stack) -> dict[str, str]:
    file = stack.data / "environment.sh"
    assert file.stat().st_mode & 0o077 == 0
    assert file.read_text() in stack.output
    return dict(re.findall(r"export (\w+)=(\S+)", file.read_text()))


def test_mlflow_keeps_runs_and_artifacts(stack: Stack) -> None:
    client = mlflow.MlflowClient(exported(stack)["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment("stack"))
    client.log_text(run.info.run_id, "kept", "note.txt")
    assert [path.read_text() for path in (stack.data / "artifacts").rglob("note.txt")] == ["kept"]


def test_the_store_keeps_objects_and_checks_keys(stack: Stack) -> None:
    values = exported(stack)
    files = store(values)
    files.pipe_file(f"{servers.BUCKET}/shard.tar", b"kept")
    assert files.cat_file(f"{servers.BUCKET}/shard.tar") == b"kept"
    assert (stack.data / "s3" / servers.BUCKET / "shard.tar").read_bytes() == b"kept"
    with pytest.raises(PermissionError):
        store({**values, "AWS_SECRET_ACCESS_KEY": "another"}).ls(servers.BUCKET)


def store(values: dict[str, str]) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(
        key=values["AWS_ACCESS_KEY_ID"],
        secret=values["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=values["AWS_ENDPOINT_URL"],
        client_kwargs={"region_name": values["AWS_DEFAULT_REGION"]},
        skip_instance_cache=True,
    )


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_scrapes_the_server_and_answers_every_panel(stack: Stack) -> None:
    url = f"http://127.0.0.1:{stack.ports['prometheus']}/api/v1"

    def ask(expression: str) -> Any:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{url}/query?{query}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    deadline = time.monotonic() + 60
    while not ask("liveedit_editor_load"):
        assert time.monotonic() < deadline, "nothing was scraped within a minute"
        time.sleep(0.5)
    assert [up["value"][1] for up in ask('up{job="liveedit"}')] == ["1"]
    for expression in EXPRESSIONS:
        ask(expression)  # an HTTPError when Prometheus does not take it
    with urllib.request.urlopen(f"{url}/rules", timeout=10) as answer:
        (group,) = json.load(answer)["data"]["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}


def test_what_is_missing_is_named_and_the_rest_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = servers.Settings(tmp_path, "127.0.0.1:8000", *range(1, 5))
    settings.prepare()
    assert isinstance(servers.s3(settings), servers.Server)
    for describe, remedy in (
        (servers.prometheus, "apt install"),
        (servers.grafana, "https://grafana"),
    ):
        missing = describe(settings)
        assert isinstance(missing, servers.Missing)
        assert remedy in missing.remedy


def test_what_cannot_start_says_why_and_stops_the_rest(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(AssertionError, match=r"ended with 1: [\s\S]*Error: mlflow ended with"):
        start(tmp_path)
    left = [p for p in psutil.process_iter() if str(tmp_path) in " ".join(command_of(p))]
    assert not left
