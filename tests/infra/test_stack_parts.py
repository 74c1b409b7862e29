"""The parts of the local stack that need none of its servers: keys, files, ports, ends."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.stack import servers, up
from infra.stack.servers import Missing, Server, Settings
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


def test_a_part_has_its_time_to_end_by_itself(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database writes what it holds. It is not waited for when it has."""
    monkeypatch.setattr(up, "STOP_S", 30.0)
    command = [sys.executable, "-c", GENTLE, str(settings.data)]
    process = StackProcess(Server("x", 1, "", "", command, {}), settings)
    deadline = time.monotonic() + 60
    while not (settings.data / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    began = time.monotonic()
    process.stop()
    assert time.monotonic() - began < 25
    assert (settings.data / "ended").exists()
    assert process.process.returncode == 0


HOSTED = {"mlflow": 5051, "s3": 9051, "prometheus": 9191, "grafana": 3131}


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Every part as if it were there, each on a port of its own; Grafana where packages put it."""
    for name in ("data", "bin", "share/grafana/conf"):
        (folder / name).mkdir(parents=True)
    (folder / "share" / "grafana" / "conf" / "defaults.ini").touch()
    (folder / "data" / "mlflow.db").touch()  # in use for long: it is not made anew
    monkeypatch.setattr(servers, "_make_database", None)
    monkeypatch.setattr(servers.shutil, "which", lambda name: str(folder / "bin" / name))
    monkeypatch.setattr(servers, "find_spec", lambda name: name)
    settings = Settings(folder / "data", "10.0.0.7:8123", **HOSTED)
    settings.prepare()
    return settings


def test_every_part_answers_where_it_is_told_and_keeps_all_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = installed(tmp_path, monkeypatch)
    parts = {part.name: part for part in (make(settings) for make in servers.SERVERS)
             if isinstance(part, Server)}  # fmt: skip
    assert list(parts) == list(HOSTED)
    ready = {"mlflow": "/health", "s3": "/", "prometheus": "/-/ready", "grafana": "/api/health"}
    for name, part in parts.items():
        address = f"http://127.0.0.1:{HOSTED[name]}"
        assert (part.port, part.address) == (HOSTED[name], address)
        assert part.ready == address + ready[name]
    data, binaries = tmp_path / "data", tmp_path / "bin"
    assert parts["mlflow"].command == [
        sys.executable, "-m", "mlflow", "server", f"--backend-store-uri=sqlite:///{data}/mlflow.db",
        f"--artifacts-destination={data}/artifacts", "--host=127.0.0.1", "--port=5051",
        "--workers=1",
    ]  # fmt: skip
    assert parts["s3"].command == [
        sys.executable, "-m", "nanio", "serve", "--host", "127.0.0.1", "--port", "9051",
        "--data-dir", f"{data}/s3", "--log-level", "warning", "--no-access-log",
    ]  # fmt: skip
    assert parts["prometheus"].command == [
        f"{binaries}/prometheus", f"--config.file={data}/prometheus/prometheus.yml",
        f"--storage.tsdb.path={data}/prometheus/data", "--log.level=warn",
        "--web.listen-address=127.0.0.1:9191",
    ]  # fmt: skip
    home = tmp_path / "share" / "grafana"
    assert parts["grafana"].command == [f"{binaries}/grafana", "server", f"--homepath={home}"]


def test_what_a_part_is_told_goes_before_what_the_shell_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all else of the shell's goes along."""
    infra = servers.INFRA
    told = {
        "mlflow": {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        "s3": {"NANIO_ACCESS_KEY": "liveedit", "NANIO_SECRET_KEY": None},
        "prometheus": {},
        "grafana": {
            "GF_SERVER_HTTP_ADDR": "127.0.0.1",
            "GF_SERVER_HTTP_PORT": "3131",
            "GF_PATHS_DATA": f"{tmp_path}/data/grafana",
            "GF_PATHS_PROVISIONING": f"{infra}/grafana/provisioning",
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
            "PROMETHEUS_URL": "http://127.0.0.1:9191",
            "DASHBOARDS": f"{infra}/grafana/dashboards",
        },
    }
    for name in {name for values in told.values() for name in values}:
        monkeypatch.setenv(name, "the shell's")
    monkeypatch.setenv("LIVEEDIT_SEEN", "the shell's")
    settings = installed(tmp_path, monkeypatch)
    for make in servers.SERVERS:
        part = make(settings)
        assert isinstance(part, Server)
        for variable, value in told[part.name].items():
            assert part.environment[variable] == (value or settings.secret_key), variable
        assert part.environment["LIVEEDIT_SEEN"] == "the shell's"


def test_the_shell_s_file_points_at_the_parts(tmp_path: Path) -> None:
    settings = Settings(tmp_path, "x:1", **HOSTED)
    settings.prepare()
    assert (tmp_path / "s3" / "liveedit").is_dir()
    lines = settings.environment_file.read_text().splitlines()
    assert lines == [
        "export MLFLOW_TRACKING_URI=http://127.0.0.1:5051",
        "export AWS_ENDPOINT_URL=http://127.0.0.1:9051",
        "export AWS_ACCESS_KEY_ID=liveedit",
        f"export AWS_SECRET_ACCESS_KEY={settings.secret_key}",
        "export AWS_DEFAULT_REGION=us-east-1",
    ]


def test_what_is_not_installed_is_told_with_how_to_get_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers.shutil, "which", lambda name: None)
    monkeypatch.setattr(servers, "find_spec", lambda name: None)
    for make, remedy in (
        (servers.s3, "pip install nanio"),
        (servers.prometheus, "apt install prometheus"),
        (servers.grafana, "https://grafana.com"),
    ):
        part = make(settings)
        assert isinstance(part, Missing)
        assert (part.name, remedy in part.remedy) == (make.__name__, True)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], ("localhost:8000", 5000, 9000, 9090, 3000)),
        (
            ["--application=h:1", "--mlflow=11", "--s3=12", "--prometheus=13", "--grafana=14"],
            ("h:1", 11, 12, 13, 14),
        ),
    ],
)
def test_options_of_the_stack_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], wanted: tuple[Any, ...]
) -> None:
    ran: list[Settings] = []
    data = "kept" if given else "runs/stack"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["up", *given, *(["--data=kept"] if given else [])])
    monkeypatch.setattr(up, "run", ran.append)
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(up.signal, "signal", handlers.__setitem__)
    up.main()
    assert ran == [Settings(tmp_path / data, *wanted)]
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has them ignored
        with pytest.raises(KeyboardInterrupt):
            handlers[number](number, None)


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (StackError("s3 ended with 3"), "Error: s3 ended with 3"),
        (PermissionError(13, "Permission denied"), "Error: [Errno 13] Permission denied"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_stack_that_did_not_start_ends_with_a_failure_and_one_that_is_stopped_does_not(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ended: BaseException,
    said: str | None,
) -> None:
    def run(settings: Settings) -> None:
        raise ended

    monkeypatch.setattr(sys, "argv", ["up", "--data=/kept"])
    monkeypatch.setattr(up, "run", run)
    monkeypatch.setattr(up.signal, "signal", lambda *_: None)
    if said is None:
        up.main()
        assert "everything is kept in /kept" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as raised:
            up.main()
        assert raised.value.code == said  # words: the exit code is 1


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(self.path[1:]))
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_part_is_up_if_it_answers_even_by_a_refusal(server: str) -> None:
    found = {code: up._answers(f"{server}/{code}") for code in (200, 403, 404, 499, 500, 503)}
    assert found == {200: True, 403: True, 404: True, 499: True, 500: False, 503: False}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert not up._answers(f"http://127.0.0.1:{port}/")


def running(settings: Settings, code: str, ready: str) -> StackProcess:
    return StackProcess(Server("x", 1, "", ready, [sys.executable, "-c", code], {}), settings)


def test_who_waits_for_a_part_hears_that_it_ended_or_never_answered(
    settings: Settings, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = running(settings, "import time; time.sleep(60)", f"{server}/200")
    process.wait_ready()
    process.part = Server("x", 1, "", f"{server}/500", [], {})
    monkeypatch.setattr(up, "START_S", 0.1)
    monkeypatch.setattr(up, "POLL_S", 0.05)
    log = settings.data / "logs" / "x.log"
    with pytest.raises(StackError, match=f"x does not answer at {server}/500 after 0.1 s.*{log}"):
        process.wait_ready()
    process.stop()
    monkeypatch.setattr(up, "START_S", 60.0)
    failing = "print('it begins', flush=True); raise SystemExit('so')"
    for code, said in (("", "with 0: no output"), (failing, "with 1: so")):
        process = running(settings, code, f"{server}/500")
        with pytest.raises(StackError, match=f"x ended {said}; its log is {log}"):
            process.wait_ready()
    with pytest.raises(StackError, match="with 0: so"):  # a log goes on where the last one ended
        running(settings, "", f"{server}/500").wait_ready()


def test_a_part_that_ends_takes_the_others_down(
    settings: Settings, server: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    begun, ended = settings.data / "begun", settings.data / "ended"
    wait = f"import time, pathlib\nwhile not pathlib.Path({str(begun)!r}).exists(): time.sleep(.02)"
    gentle = [sys.executable, "-c", GENTLE, str(settings.data)]
    there = f"{server}/200"
    parts: list[Server | Missing] = [
        Missing("absent", "get it"),
        Server("first", 0, "http://first", there, gentle, {}),
        Server("second", 0, "http://second", there, [sys.executable, "-c", f"{wait}\nexit(3)"], {}),
    ]
    monkeypatch.setattr(up, "SERVERS", tuple(lambda _, part=part: part for part in parts))
    monkeypatch.setattr(up.signal, "signal", lambda *_: None)
    with pytest.raises(StackError, match="second ended with 3"):
        up.run(settings)
    assert ended.exists()
    told = capsys.readouterr().out
    assert "absent     not installed: get it" in told
    assert "first      http://first" in told


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_leaves_no_part_running(
    settings: Settings, server: str, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    """Databases take seconds to end, in which many people press it again."""
    begun: list[StackProcess] = []

    class Impatient(StackProcess):
        def __init__(self, part: Server, settings: Settings) -> None:
            super().__init__(part, settings)
            begun.append(self)

        def check(self) -> None:
            signal.raise_signal(signal.SIGINT)

        def stop(self) -> None:
            signal.raise_signal(signal.SIGINT)
            super().stop()

    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    parts = [Server(name, 0, "", f"{server}/200", sleep, {}) for name in ("first", "second")]
    monkeypatch.setattr(up, "SERVERS", tuple(lambda _, part=part: part for part in parts))
    monkeypatch.setattr(up, "StackProcess", Impatient)
    try:
        with pytest.raises(KeyboardInterrupt):
            up.run(settings)
        assert [part.process.poll() is None for part in begun] == [False, False]
    finally:
        for part in begun:
            part.process.kill()
            part.process.wait()
