"""The ground that everything stands on, with a Ray that only notes what it is told."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray as ray_package
from ray._private.runtime_env.packaging import create_package
from ray.serve import context as serve_context

from infra.runtime import paths, ray, ray_private
from infra.runtime.environment import everything
from infra.runtime.ray import ClusterError


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray.init` was given last."""
    seen: dict[str, Any] = {}

    def init(**options: Any) -> None:
        seen.clear()
        seen.update(options, environment=everything())
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray takes it over

    monkeypatch.setattr(ray_package, "init", init)
    monkeypatch.setattr(ray_package, "shutdown", lambda: seen.update(ended=True))
    monkeypatch.setattr(ray, "reread_settings", lambda: None)
    return seen


@pytest.fixture(autouse=True)
def handler() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_private_ray_is_its_users_alone_and_goes_with_all_it_wrote(told: dict[str, Any]) -> None:
    with ray.private_ray(3, namespace="n") as folder:
        token = folder / "token"
        assert token.stat().st_mode & 0o777 == 0o600
        assert len(token.read_text()) == 64
        assert (told["num_cpus"], told["namespace"]) == (3, "n")
        assert (told["address"], told["_temp_dir"]) == ("local", str(folder))
    assert not folder.exists()


def test_where_something_went_wrong_the_logs_are_kept_and_named(told: dict[str, Any]) -> None:
    def fail() -> None:
        with ray.private_ray(1):
            raise RuntimeError("a worker failed")

    with pytest.raises(RuntimeError) as raised:
        fail()
    (note,) = raised.value.__notes__
    folder = Path(note.removeprefix("The workers' logs are in ")).parent.parent
    assert folder.is_dir()
    shutil.rmtree(folder)


def test_a_clusters_workers_get_this_tree_and_what_is_set_for_them(told: dict[str, Any]) -> None:
    with ray.joined_ray("auto", "SETTING", env_vars={"LOADS": "our.ingress"}):
        assert told["address"] == "auto"
        assert told["runtime_env"]["env_vars"] == {"LOADS": "our.ingress"}
        assert told["runtime_env"]["working_dir"] == str(paths.ROOT)


def test_of_a_checkout_a_cluster_gets_the_packages_alone(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ray's own packing, which knows no ignored file but those in a .gitignore."""
    (tmp_path / ".gitignore").write_text("/data/mine\n")
    sent = {"data/samples/clip.mp4", "infra/a.py", "modeling/gpu/conv.cu", "pipelines/start/w.bin"}
    sent |= {"serve/front/page/page.js"}
    left = {".git/objects/o", ".cache/o", "runs/demo/w.bin", "weights/w.bin", "clip.mp4"}
    left |= {"data/mine/clip.mp4", "serve/__pycache__/a.pyc"}
    for name in sent | left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(ray, "ROOT", tmp_path)
    with ray.joined_ray("auto", "SETTING"):
        given = told["runtime_env"]
    create_package(given["working_dir"], tmp_path / "it.zip", True, excludes=given["excludes"])
    with zipfile.ZipFile(tmp_path / "it.zip") as packed:
        assert {name for name in packed.namelist() if not name.endswith("/")} == sent
    packages = {file.parent.name for file in paths.ROOT.glob("*/__init__.py")}
    assert set(ray.SENT) == packages - {"tests"}


def test_a_cluster_is_not_joined_with_what_an_earlier_ray_was_told(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the token of a private one, which this process had before."""
    reread: list[bool] = []
    monkeypatch.setattr(ray, "reread_settings", lambda: reread.append("address" not in told))
    with ray.joined_ray("auto", "SETTING"):
        assert reread == [True]


def test_a_programs_own_handler_outlives_the_start_of_ray(told: dict[str, Any]) -> None:
    def ours(number: int, frame: Any) -> None: ...

    signal.signal(signal.SIGTERM, ours)
    ray._init()
    assert signal.getsignal(signal.SIGTERM) is ours
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ray._init()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # Ray's: nobody had one


def test_a_path_counts_from_here_before_it_counts_from_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths.find_path("data/samples") == paths.ROOT / "data" / "samples"
    (tmp_path / "data" / "samples").mkdir(parents=True)
    assert paths.find_path("data/samples") == tmp_path / "data" / "samples"
    assert paths.find_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("state", "running", "stopping"),
    [
        ("STARTING", False, False), ("RUNNING", True, False), ("STOPPING", False, True),
        ("RECOVERING", False, False),
    ],
)  # fmt: skip
def test_a_replica_runs_or_stops_by_serves_own_word(
    state: str, running: bool, stopping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = {"replica_id": "r1", "state": state, "pid": 7}
    details = {"applications": {"app": {"deployments": {"editor": {"replicas": [replica]}}}}}
    client = SimpleNamespace(get_serve_details=lambda: details)
    monkeypatch.setattr(ray_private, "serve_client", lambda: client)
    assert ray_private.serve_replicas("app") == [
        ray_private.Replica("r1", "editor", running, stopping, 7)
    ]
    assert ray_private.serve_replicas("another") == []
    monkeypatch.setattr(ray_private, "serve_client", lambda: None)
    assert ray_private.serve_replicas("app") == []


def test_a_serve_that_is_forgotten_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would look for a Ray that has ended."""
    monkeypatch.setattr(serve_context, "_global_client", object())
    ray_private.forget_serve()
    assert serve_context._global_client is None


def test_a_private_ray_takes_nobody_else_s_token(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would take the one in the variable before the one in the file."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    read: list[dict[str, str]] = []
    monkeypatch.setattr(ray, "reread_settings", lambda: read.append(everything()))
    with ray.private_ray(1) as folder:
        for seen in (*read, told["environment"]):
            assert "RAY_AUTH_TOKEN" not in seen
            assert seen["RAY_AUTH_MODE"] == "token"
            assert seen["RAY_AUTH_TOKEN_PATH"] == str(folder / "token")
            assert seen["RAY_USAGE_STATS_ENABLED"] == "0"
        assert len(read) == 1
        assert (told["include_dashboard"], told["log_to_driver"]) == (False, False)
    assert everything()["RAY_AUTH_TOKEN"] == "of another Ray"
    assert "RAY_AUTH_MODE" not in everything()
    assert told["ended"]


def test_a_ray_that_does_not_start_says_so_and_keeps_its_logs(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(ray_package, "init", init)
    with (
        pytest.raises(ClusterError, match="did not start on this machine: no room") as raised,
        ray.private_ray(1),
    ):
        pass
    assert ClusterError.exit_code == 75
    (note,) = raised.value.__notes__
    shutil.rmtree(Path(note.removeprefix("The workers' logs are in ")).parents[1])


def test_who_stops_a_private_ray_leaves_nothing(told: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt), ray.private_ray(1) as folder:
        raise KeyboardInterrupt
    assert not folder.exists()
    assert told["ended"]


@pytest.mark.parametrize(("set_to", "seen"), [(None, "1"), ("0", "0")])
def test_a_job_joins_with_its_own_tree_unless_it_is_told_not_to(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, set_to: str | None, seen: str
) -> None:
    name = "RAY_OVERRIDE_JOB_RUNTIME_ENV"
    if set_to is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, set_to)

    def fail() -> None:
        with ray.joined_ray("auto", "SETTING", namespace="n"):
            raise OSError("ours")

    with pytest.raises(OSError, match="ours"):
        fail()
    assert told["environment"][name] == seen
    assert told["namespace"] == "n"
    assert told["runtime_env"]["env_vars"] == {}
    assert everything().get(name) == set_to
    assert told["ended"]


def test_a_cluster_that_does_not_answer_is_named_with_its_setting(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray_package, "init", init)
    with (
        pytest.raises(ClusterError, match=r"SETTING=auto: no Ray cluster .*nobody there"),
        ray.joined_ray("auto", "SETTING"),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("10.0.0.7:6379", ("10.0.0.7", 6379)),
        ("ray://head.video:10001", ("head.video", 10001)),
        ("ray://[2001:db8::7]:10001", ("2001:db8::7", 10001)),  # the brackets are the address's
        ("[::1]:6379", ("::1", 6379)),
        ("auto", None),
    ],
)
def test_who_listens_is_asked_at_the_host_and_port_of_the_address(
    monkeypatch: pytest.MonkeyPatch, address: str, asked: tuple[str, int] | None
) -> None:
    found: list[tuple[str, int]] = []

    def connect(place: tuple[str, int], timeout: float) -> Any:
        found.append(place)
        assert timeout == ray.CONNECT_S  # Ray's own is minutes
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(ray.socket, "create_connection", connect)
    ray.check_address(address, "SETTING")
    assert found == ([] if asked is None else [asked])


@pytest.mark.parametrize(
    ("place", "writable", "wanted"),
    [("/" + "x" * 29, True, None), ("/" + "x" * 30, True, "/tmp"), ("/" + "x" * 30, False, None)],
)
def test_a_long_tmpdir_is_left_for_tmp_where_one_may_write(
    monkeypatch: pytest.MonkeyPatch, place: str, writable: bool, wanted: str | None
) -> None:
    monkeypatch.setattr(ray.tempfile, "tempdir", place)
    monkeypatch.setattr(ray.os, "access", lambda *_: writable)
    assert ray._short_tmp() == wanted


def test_what_belongs_to_a_ray_is_told_by_arguments_files_and_parents(tmp_path: Path) -> None:
    """Ray's workers have titles over their arguments, and their children name nothing of it."""
    commands = [
        # named in the arguments, a child, and a child's
        f"bash -c 'sleep 64; :' & sleep 61 & : {tmp_path}; wait",
        f"exec -a ray::IDLE sleep 62 > {tmp_path}/log",  # writes there
        "exec -a ray::IDLE sleep 63 > /dev/null",  # of another Ray
    ]
    started = [subprocess.Popen(["bash", "-c", command]) for command in commands]
    try:
        deadline = time.monotonic() + 60
        while True:
            found = {" ".join(p.cmdline()[-2:]) for p in ray._processes(tmp_path)}
            found = {said for said in found if said.endswith(("61", "62", "63", "64"))}
            if found == {"sleep 61", "sleep 64", "ray::IDLE 62"}:
                break
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
    finally:
        for process in started:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
