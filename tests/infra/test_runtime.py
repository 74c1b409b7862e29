"""The ground that everything stands on, with a Ray that only notes what it is told."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray as ray_package

from infra.runtime import paths, ray, ray_private, registry
from infra.runtime.registry import Pointed, RegistryError


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray.init` was given last."""
    seen: dict[str, Any] = {}

    def init(**options: Any) -> None:
        seen.clear()
        seen.update(options)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray takes it over

    monkeypatch.setattr(ray_package, "init", init)
    monkeypatch.setattr(ray_package, "shutdown", lambda: None)
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


@pytest.mark.parametrize(
    ("before", "share", "found"),
    [
        ("1,2,3", "0.25", Pointed("3", 0.25, "2")),  # the latest of those before it
        ("2,3,1", None, Pointed("3", 1.0, "1")),
        ("3", "1", Pointed("3")),
        ("", "0", Pointed("3", 0.0)),
        ("", "nan", None), ("", "half", None), ("", "1.01", None), ("", "-0.1", None),
    ],
)  # fmt: skip
def test_an_alias_says_which_version_was_before_it_and_what_share_is_its(
    before: str, share: str | None, found: Pointed | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {registry.BEFORE + "production": before, registry.SHARE + "other": "0.5"}
    if share is not None:
        tags[registry.SHARE + "production"] = share
    model = SimpleNamespace(aliases={"production": 3}, tags=tags)
    client = SimpleNamespace(get_registered_model=lambda name: model)
    monkeypatch.setattr(registry, "client_for", lambda uri: client)
    if found is None:
        with pytest.raises(RegistryError, match="a share of new sessions is from 0 to 1"):
            registry.pointed("models:/ours@production", "sqlite:///x.db")
    else:
        assert registry.pointed("models:/ours@production", "sqlite:///x.db") == found
