"""The parts of starting and finding Ray that need no Ray."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import infra.runtime.ray as ray_runtime
from infra.runtime.environment import environment, unless_set
from infra.runtime.errors import UserError
from infra.runtime.ray import ClusterError, check_address, joined_ray
from infra.runtime.ray_private import Replica
from serve import run
from serve.run import Running, StartError, _cpus, free_port
from serve.settings import ServeSettings
from serve.tls import Tls
from tests.processes import port_just_left


def test_variables_are_set_for_a_while_and_then_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIVEEDIT_THERE", "before")
    monkeypatch.setenv("LIVEEDIT_TAKEN", "before")
    monkeypatch.delenv("LIVEEDIT_NEW", raising=False)
    names = ("LIVEEDIT_THERE", "LIVEEDIT_TAKEN", "LIVEEDIT_NEW")
    before = [os.environ.get(name) for name in names]
    values = {"LIVEEDIT_THERE": "now", "LIVEEDIT_TAKEN": None, "LIVEEDIT_NEW": "now"}

    def fail() -> None:
        with environment(values):
            assert [os.environ.get(name) for name in names] == ["now", None, "now"]
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    assert [os.environ.get(name) for name in names] == before


def test_a_default_gives_way_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEEDIT_THERE", "before")
    monkeypatch.delenv("LIVEEDIT_NEW", raising=False)
    assert unless_set({"LIVEEDIT_THERE": "x", "LIVEEDIT_NEW": "y"}) == {
        "LIVEEDIT_THERE": "before", "LIVEEDIT_NEW": "y",
    }  # fmt: skip


def test_a_ray_that_refuses_who_brings_no_token_is_told_from_one_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**options: Any) -> None:  # Ray itself tries for half a minute
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray_runtime, "_init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            pytest.raises(ClusterError, match=r"SETTING=.*; set RAY_AUTH_MODE=token if it asks"),
            joined_ray(address, "SETTING"),
        ):
            pass


@pytest.mark.parametrize("form", ["{}", "ray://{}", "http://{}/path"])
def test_an_address_where_nobody_listens_is_said_at_once(form: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = form.format(f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(ClusterError, match=r"SETTING=.*no Ray cluster answers there"):
            check_address(address, "SETTING")
        listener.listen()
        check_address(address, "SETTING")
    check_address("auto", "SETTING")
    check_address("local", "SETTING")
    for address in ("localhost", "10.0.0.1"):
        with pytest.raises(UserError, match=rf"SETTING={address} is no address .* ray://HOST"):
            check_address(address, "SETTING")


def test_a_server_is_waited_for_and_named_when_it_does_not_come() -> None:
    running = Running("127.0.0.1", free_port())
    with pytest.raises(StartError, match=f"{running.port} is not ready after 0.3 s"):
        running.wait_ready(0.3)
    assert running.stream_url == f"ws://127.0.0.1:{running.port}"
    assert Running("0.0.0.0", 80).url == "http://localhost:80"


def test_who_waits_for_a_server_hears_what_it_answers() -> None:
    """Until it is ready: that it loads, or what is wrong with its model."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/readyz"
            told = b"" if ready.is_set() else b"editor a is loading weights, for 2 s"
            self.send_response(503 if told else 200)
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *_: object) -> None:
            pass

    ready = threading.Event()
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running = Running("127.0.0.1", server.server_port)
        with pytest.raises(StartError, match=r"after 0.1 s: editor a is loading weights, for 2 s$"):
            running.wait_ready(0.1)
        ready.set()
        running.wait_ready(5)
        server.shutdown()


def test_a_server_that_starts_is_asked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs the cores itself."""
    now, asked = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def ask(url: str, *, context: ssl.SSLContext | None, **_: Any) -> None:
        nonlocal asked
        asked += 1
        trusts = context is not None and context.verify_mode == ssl.CERT_NONE
        assert (url, trusts) == (f"{running.url}/readyz", running.tls is not None)
        sleep(0.001)
        raise OSError

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(run.urllib.request, "urlopen", ask)
    for tls in (None, Tls(Path("cert.pem"), Path("key.pem"))):  # it trusts its own, made out to
        running, now, asked = Running("127.0.0.1", 80, tls), 0.0, 0  # whatever name
        with pytest.raises(StartError):
            running.wait_ready(10.0)
        assert 10 < asked < 100


def test_serve_listens_where_it_was_told_to_with_the_certificate_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve's process has another working directory."""
    monkeypatch.chdir(tmp_path)
    tls = Tls(Path("cert.pem"), Path("key.pem"))
    found = [run._http_options(Running("0.0.0.0", 8443, given)) for given in (tls, None)]
    assert [(options.host, options.port) for options in found] == [("0.0.0.0", 8443)] * 2
    assert [(options.ssl_certfile, options.ssl_keyfile) for options in found] == [
        (str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")), (None, None),
    ]  # fmt: skip
    assert Running("h", 1, tls).url == "https://h:1"
    assert Running("h", 1, tls).stream_url == "wss://h:1"


@pytest.mark.parametrize(
    ("whom", "killed", "told"),
    [("hub", 7, "hub"), ("editor", 4, "editor 4"), ("front", 5, "front 5"), ("nobody", None, None)],
)
def test_who_is_killed_is_the_one_that_runs(
    whom: str, killed: int | None, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Editor 2 is just dead, of which Serve has not heard, and editor 3 just starts."""
    replicas = [
        Replica("editor 1", "editor", running=True, stopping=False, pid=None),
        Replica("editor 2", "editor", running=True, stopping=False, pid=2),
        Replica("editor 3", "editor", running=False, stopping=False, pid=3),
        Replica("editor 4", "editor", running=True, stopping=False, pid=4),
        Replica("front 5", "front", running=True, stopping=False, pid=5),
    ]
    dead: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        if pid == 2:
            raise ProcessLookupError
        dead.append((pid, number))

    hub = SimpleNamespace(pid=SimpleNamespace(remote=lambda: 7))
    monkeypatch.setattr(run, "serve_replicas", lambda app: replicas)
    monkeypatch.setattr(run, "_hub", lambda: hub)
    monkeypatch.setattr(run.ray, "get", lambda pid, timeout: pid)
    monkeypatch.setattr(run, "os", SimpleNamespace(kill=kill))
    running = Running("127.0.0.1", 80)
    assert running.kill(whom) == told
    assert dead == ([] if killed is None else [(killed, signal.SIGKILL)])

    def gone() -> None:
        raise ValueError("no such actor")

    monkeypatch.setattr(run, "_hub", gone)
    assert running.kill("hub") is None  # it is being started again


def test_a_port_that_a_server_had_a_moment_ago_is_free() -> None:
    """Its connections wait for stragglers for a minute; who starts it again does not."""
    run._check_port("127.0.0.1", port_just_left())


def test_what_the_replicas_ask_of_ray() -> None:
    chosen = ServeSettings("demo", max_editors=3, editor_cpus=2.0, fronts=2, front_cpus=0.5)
    assert _cpus(chosen) == 3 * 2.0 + 2 * 0.5 + 1.0


def test_a_clusters_serve_listens_at_one_place_and_has_one_application_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = SimpleNamespace(http_config=SimpleNamespace(host="10.0.0.7", port=8000))
    applications = {"another": None}
    monkeypatch.setattr(run, "serve_client", lambda: there)
    monkeypatch.setattr(run.ray_serve, "status", lambda: SimpleNamespace(applications=applications))
    run._check_serve("10.0.0.7", 8000)
    for host, port in (("0.0.0.0", 8000), ("10.0.0.7", 8001)):
        with pytest.raises(UserError, match=rf"listens on 10.0.0.7:8000 .* not on {host}:{port}"):
            run._check_serve(host, port)
    applications[run.APP] = None
    with pytest.raises(UserError, match=r"an application liveedit runs on 10.0.0.7:8000"):
        run._check_serve("10.0.0.7", 8000)
