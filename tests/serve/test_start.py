"""An application's start and end, with a Ray and a Serve that only note what they are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import RayActorError
from ray.serve.schema import ApplicationStatus

from infra.runtime.errors import UserError
from serve import ingress, run
from serve.hub.hub import NAMESPACE
from serve.run import APP, Running, StartError, start
from serve.settings import ServeSettings
from serve.tls import Tls

LOADS, NICENESS = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "RAY_worker_niceness"
OTHER = SimpleNamespace(status=ApplicationStatus.RUNNING)


class Cluster:
    """Ray, Serve and the hub; `told` is what they were, in order. `failure` is why nothing comes
    up, `lingers` says how often an application that was deleted is still there."""

    def __init__(self, folder: Path, *, serve: bool = False) -> None:
        self.folder, self.told = folder, list[Any]()
        self.up = False
        self.client: Any = SimpleNamespace(http_config=self) if serve else None
        self.host, self.port = "127.0.0.1", 8000  # Serve's
        self.applications: dict[str, Any] = {"other": OTHER} if serve else {}
        self.failure: SimpleNamespace | None = None
        self.lingers = 0
        self.models: Any = []

    @contextmanager
    def private(self, cpus: int, **options: Any) -> Iterator[Path]:
        with self.ray("private", cpus, options):
            yield self.folder

    @contextmanager
    def joined(self, address: str, setting: str, **options: Any) -> Iterator[None]:
        with self.ray("joined", address, setting, options):
            yield

    @contextmanager
    def ray(self, *told: Any) -> Iterator[None]:
        self.told.append((*told, [os.environ.get(name) for name in (LOADS, NICENESS)]))
        self.up = True
        try:
            yield
        finally:
            self.up = False
            self.told.append("Ray ends")

    def start(self, *, http_options: Any, **options: Any) -> None:
        self.client = SimpleNamespace(http_config=http_options)
        self.told.append(("Serve", http_options.host, http_options.port))

    def run(self, application: str, *, name: str, **options: Any) -> None:
        self.applications[name] = self.failure or OTHER
        self.told.append((application, name, options))

    def status(self) -> Any:
        if self.lingers and APP not in self.applications:
            self.lingers -= 1
            return SimpleNamespace(applications={**self.applications, APP: OTHER})
        return SimpleNamespace(applications=self.applications)

    def delete(self, name: str, *, _blocking: bool) -> None:
        assert not _blocking  # it would wait as long as the replicas like
        del self.applications[name]
        self.told.append(f"{name} is deleted")

    def shutdown(self) -> None:
        self.client = None
        self.told.append("Serve ends")

    def wait_ready(self, _: Running) -> None:
        if self.failure:
            raise StartError("not ready")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    it = Cluster(tmp_path)

    def hub(name: str, namespace: str) -> Any:
        if not it.up:
            raise ValueError("no such actor")
        return SimpleNamespace(models=SimpleNamespace(remote=lambda: it.models))

    def answered(answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(run, "private_ray", it.private)
    monkeypatch.setattr(run, "joined_ray", it.joined)
    monkeypatch.setattr(run, "serve_client", lambda: it.client)
    monkeypatch.setattr(run, "forget_serve", lambda: it.told.append("Serve is forgotten"))
    monkeypatch.setattr(run, "build", lambda settings, registry: "application")
    monkeypatch.setattr(run, "ray_serve", it)
    actors = SimpleNamespace(
        is_initialized=lambda: it.up, get_actor=hub, get=answered, exceptions=run.ray.exceptions,
        kill=lambda actor: it.told.append("the hub is killed"),
    )  # fmt: skip
    monkeypatch.setattr(run, "ray", actors)
    monkeypatch.setattr(run, "_check_port", lambda host, port: None)
    finish = "the sessions have {:g} s"
    monkeypatch.setattr(run, "_finish_sessions", lambda _, s: it.told.append(finish.format(s)))
    monkeypatch.setattr(Running, "wait_ready", lambda running: it.wait_ready(running))
    monkeypatch.setattr(run, "TICK_S", 0.001)
    for name in ("RAY_ADDRESS", LOADS, NICENESS):
        monkeypatch.delenv(name, raising=False)
    return it


DEPLOYED = ("application", APP, {"route_prefix": "/", "blocking": False})
SETTINGS = ServeSettings("demo", stop_s=9.0)


def test_on_this_machine_all_ends_with_the_ray_that_was_started(cluster: Cluster) -> None:
    """Which has what its processes need from this one's environment; its hub outlives no Serve."""
    running = start(SETTINGS, host="0.0.0.0", port=8123, cpus=1)
    loads = ingress.ENVIRONMENT[LOADS]
    assert cluster.told == [
        ("private", 1, {"namespace": NAMESPACE}, [loads, "0"]),
        ("Serve", "0.0.0.0", 8123),
        DEPLOYED,
    ]  # fmt: skip
    assert running.folder == cluster.folder
    cluster.told.clear()
    running.stop()
    assert cluster.told == [
        "the sessions have 9 s", "the hub is killed", "Serve is forgotten", "Ray ends",
    ]  # fmt: skip
    assert os.environ.get(LOADS) is os.environ.get(NICENESS) is None


def test_what_the_environment_says_of_niceness_goes_before(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NICENESS, "7")
    start(SETTINGS).stop()
    assert cluster.told[0][-1] == [ingress.ENVIRONMENT[LOADS], "7"]


@pytest.mark.parametrize("others", ["Serve and theirs", "Serve", "nothing", "theirs meanwhile"])
def test_on_a_cluster_what_others_have_there_goes_on(
    cluster: Cluster, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    if others.startswith("Serve"):
        cluster.__init__(cluster.folder, serve=True)  # type: ignore[misc]
    if others == "Serve":
        cluster.applications.clear()
    running = start(SETTINGS)
    workers = {"env_vars": ingress.ENVIRONMENT, "namespace": NAMESPACE}
    assert cluster.told[0][:-1] == ("joined", "10.0.0.7:6379", "RAY_ADDRESS", workers)
    assert running.folder is None
    if others == "theirs meanwhile":
        cluster.applications["theirs"] = OTHER
    cluster.told.clear()
    cluster.lingers = 3
    running.stop()
    assert cluster.lingers == 0  # it is waited for
    assert cluster.told == [
        "the sessions have 9 s", f"{APP} is deleted",
        *(["Serve ends"] if others == "nothing" else []),
        "the hub is killed", "Serve is forgotten", "Ray ends",
    ]  # fmt: skip


def test_who_is_in_a_hurry_does_not_wait_for_replicas(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "DELETE_S", 0.01)
    cluster.applications[APP], cluster.lingers = OTHER, 10**9
    running = Running("127.0.0.1", 8000)
    running.hurry.set()
    run._delete(running)
    assert (cluster.told, cluster.lingers) == ([f"{APP} is deleted"], 10**9)


def test_nor_does_anybody_wait_for_ever(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "DELETE_S", 0.01)
    cluster.applications[APP], cluster.lingers = OTHER, 10**9
    run._delete(Running("127.0.0.1", 8000))


REASON = (
    "Traceback:\n  File x\nValueError: first\n\nduring that:\nmodels.ModelError: no model\n at y"
)


@pytest.mark.parametrize(
    ("status", "messages", "said"),
    [
        ("DEPLOY_FAILED", [REASON, ""], "models.ModelError: no model"),  # the last cause
        ("DEPLOY_FAILED", ["", "no pod\n is free\n"], "is free"),
        ("DEPLOY_FAILED", ["ErrorsAreMany"], "ErrorsAreMany"),
        ("DEPLOY_FAILED", [], "the application's own"),
        ("DEPLOYING", [REASON], "not ready"),
    ],
)
def test_why_it_does_not_start_is_serves_own_word_in_a_line(
    cluster: Cluster, status: str, messages: list[str], said: str
) -> None:
    """And what was begun is ended; nobody has a session yet."""
    cluster.failure = SimpleNamespace(
        status=ApplicationStatus[status], message="the application's own",
        deployments={str(n): SimpleNamespace(message=text) for n, text in enumerate(messages)},
    )  # fmt: skip
    with pytest.raises(StartError, match=rf"^the application did not start: {said}$"):
        start(SETTINGS)
    assert cluster.told[3:] == ["the hub is killed", "Serve is forgotten", "Ray ends"]


def test_what_does_not_start_on_a_cluster_is_taken_away_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    cluster.failure = SimpleNamespace(status=ApplicationStatus.DEPLOYING)
    with pytest.raises(StartError, match="did not start: not ready"):
        start(SETTINGS)
    assert cluster.told[3:] == [
        f"{APP} is deleted", "Serve ends", "the hub is killed", "Serve is forgotten", "Ray ends",
    ]  # fmt: skip


def test_a_certificate_is_looked_at_before_anything_is_started(
    cluster: Cluster, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no TLS with certificate"):
        start(SETTINGS, tls=Tls(tmp_path / "cert.pem", tmp_path / "key.pem"))
    assert cluster.told == []


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([{"name": "m"}], None),
        ([], "no editor says which model it has"),
        (RayActorError(), "the hub does not say which models there are"),
        (None, "the hub does not say which models there are: no such actor"),
    ],
)
def test_what_is_served_is_the_hubs_word(cluster: Cluster, models: Any, said: str | None) -> None:
    cluster.models, cluster.up = models, models is not None
    running = Running("127.0.0.1", 8000)
    if said is None:
        assert running.models() == models
    else:
        with pytest.raises(StartError, match=said):
            running.models()


@pytest.mark.parametrize("private", [True, False])
def test_a_stop_that_hangs_is_ended_with_all_that_was_started(
    private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    codes: list[int] = []

    def child(number: int) -> Any:
        def kill() -> None:
            if number == 1:
                raise psutil.NoSuchProcess(number)  # it has just ended
            killed.append(number)

        return SimpleNamespace(kill=kill)

    def children(recursive: bool) -> list[Any]:
        return [child(number) for number in range(3 if recursive else 1)]

    folder = tmp_path / "ray"
    folder.mkdir()
    monkeypatch.setattr(run.psutil, "Process", lambda: SimpleNamespace(children=children))
    monkeypatch.setattr(run.os, "_exit", codes.append)
    Running("127.0.0.1", 1, folder=folder if private else None).abandon()
    assert (killed, codes) == ([0, 2], [1])
    assert folder.exists() is not private
