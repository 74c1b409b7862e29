"""`serve deploy infra/serve.yaml` on a cluster: the text that KubeRay hands to Serve as well."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from websockets.sync.client import connect as connect_socket

from serve import ingress
from serve.client import connect
from serve.run import free_port
from tests.serve.client.test_stream import send_all
from tests.serve.conftest import clip
from tests.serve.models import save_small_model
from tests.serve.tokens import write_tokens

ROOT = Path(__file__).parent.parent.parent
TOKEN = "a-token-for-this-test"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What a head node is, without what `ray start` shares with other Rays of this machine.
HEAD = """
import sys, ray
ray.init(address="local", include_dashboard=True, dashboard_port=int(sys.argv[1]),
         num_cpus=4, _temp_dir=sys.argv[2], log_to_driver=False)
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Unix sockets have short names, and Ray adds 60 characters to this one.
    path = Path(tempfile.mkdtemp(prefix="liveedit-ray-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    token = folder / "ray-token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    ours = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    return {
        **ours,
        **ingress.ENVIRONMENT,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture(scope="module")
def dashboard(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a cluster of one node."""
    port = free_port()
    command = [sys.executable, "-c", HEAD, str(port), str(folder / "ray")]
    head = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        assert head.stdout.readline() == "up\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        head.stdin.close()
        head.wait(60)


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    """infra/serve.yaml with this machine's model, port and sizes in it."""
    write_tokens(folder / "tokens", {"ours": TOKEN})
    config: dict[str, Any] = yaml.safe_load((ROOT / "infra" / "serve.yaml").read_text())
    config["http_options"].update(host="127.0.0.1", port=free_port())
    (application,) = config["applications"]
    changes = {
        "model": str(save_small_model(folder / "small")),
        "token_file": str(folder / "tokens"),
        "editor_gpus": 0.0,
        "editor_cpus": 0.5,
        "fronts": 1,
        "front_cpus": 0.5,
    }
    assert set(changes) <= set(application["args"])
    application["args"].update(changes)
    return config


@pytest.fixture(scope="module")
def url(dashboard: str, environment: dict[str, str], config: Any, folder: Path) -> str:
    """Where the deployed application listens, once an editor is warmed up."""
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    serve = str(Path(sys.executable).with_name("serve"))
    command = [serve, "deploy", "--address", dashboard, str(file)]
    sent = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    deadline = time.monotonic() + 240
    answer = "nothing"
    while time.monotonic() < deadline:
        try:
            response = httpx.get(f"{url}/readyz", timeout=5)
            answer = f"{response.status_code}: {response.text}"
            if response.status_code == 200:
                return url
        except httpx.TransportError as error:
            answer = repr(error)
        time.sleep(0.3)
    command = [serve, "status", "--address", dashboard]
    status = subprocess.run(command, env=environment, capture_output=True, text=True)
    raise AssertionError(f"not ready: {answer}\n{status.stdout}{status.stderr}")


def test_the_deployed_application_edits_for_whoever_has_a_token(url: str) -> None:
    assert httpx.get(f"{url}/v1/models").status_code == 401
    models = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {TOKEN}"})
    assert [model["name"] for model in models.json()["models"]] == ["small"]

    async def edit() -> list[int]:
        async with connect(
            url.replace("http", "ws"), "make it red", width=48, height=32, fps=16, token=TOKEN
        ) as stream:
            sending = asyncio.create_task(send_all(stream, clip(30)))
            edited = [frame.index async for frame in stream]
            await sending
            return edited

    assert asyncio.run(edit()) == list(range(30))


def test_its_sockets_are_those_of_our_ingress(url: str) -> None:
    place = f"{url.replace('http', 'ws')}/v1/stream"
    with connect_socket(place, subprotocols=["liveedit.v1"], compression="deflate") as socket:
        assert socket.protocol.extensions == []


def test_prometheus_finds_fronts_and_editors_at_its_one_address(url: str) -> None:
    text = httpx.get(f"{url}/metrics").text
    assert "liveedit_sessions{" in text
    assert "liveedit_editor_load{" in text


def test_kuberay_sees_it_running(dashboard: str, environment: dict[str, str], url: str) -> None:
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    answer = httpx.get(
        f"{dashboard}/api/serve/applications/", headers={"Authorization": f"Bearer {token}"}
    )
    (application,) = answer.json()["applications"].values()
    assert application["status"] == "RUNNING"
    assert set(application["deployments"]) == {"front", "editor"}
