"""Which nodes of a cluster are asked for the output's folder, and what each looks at."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from infra.runtime.ray import ClusterError
from pipelines.config.merge import ConfigError
from pipelines.config.stages import ComputeConfig
from pipelines.training import cluster
from pipelines.training.cluster import _nodes, _reads, check_folder_is_shared, ray_session


def node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {
        "NodeID": name,
        "NodeManagerHostname": f"host-{name}",
        "NodeManagerAddress": f"10.0.0.{name}",
        "Alive": alive,
        "Resources": resources,
    }


NODES = [
    node("1"),  # without a core for workers: the controller runs there
    node("2", CPU=8.0),
    node("3", CPU=2.0, GPU=1.0),
    node("4", CPU=0.5, GPU=8.0),
    node("5", alive=False, CPU=64.0, GPU=8.0),
]


@pytest.mark.parametrize(
    ("compute", "gpus", "asked"),
    [
        ({}, 9, "13"),
        ({}, 0, "123"),
        ({"gpus": False}, 9, "123"),
        ({"gpus": True}, 0, "13"),
        ({"gpus": False, "cpus_per_worker": 4.0}, 9, "12"),
        ({"cpus_per_worker": 0.5}, 9, "134"),
    ],
)
def test_nodes_that_may_get_a_worker_and_the_controllers_own_are_asked(
    compute: dict[str, Any], gpus: int, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 10.0, "GPU": gpus})
    here = SimpleNamespace(get_node_id=lambda: "1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    assert _nodes(ComputeConfig(**compute)) == {n: f"host-{n} (10.0.0.{n})" for n in asked}


def test_a_node_says_what_it_sees_instead(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    assert _reads(str(probe), "token", late_s=0) == "No such file or directory"
    probe.write_text("another")
    assert _reads(str(probe), "token", late_s=0) == "another file lies there"
    assert _reads(str(probe / "in it"), "token", late_s=0) == "Not a directory"
    assert _reads(str(tmp_path), "token", late_s=0) == "Is a directory"
    probe.write_text("token")
    assert _reads(str(probe), "token", late_s=0) is None


def test_a_node_that_sees_a_file_late_has_seen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shared disk's caches show it: nothing, then what was there before."""
    probe, comes = tmp_path / "probe", ["another", "token"]
    monkeypatch.setattr(cluster.time, "sleep", lambda _: probe.write_text(comes.pop(0)))
    assert _reads(str(probe), "token", late_s=60) is None
    assert comes == []


@pytest.mark.parametrize(
    ("answers", "error", "words"),
    [
        ({"a": None, "b": None}, None, ""),
        ({"a": None, "b": "another file lies there"}, ConfigError, r"\(b: another file lies there"),
        ({"a": RayError("x"), "b": None}, ClusterError, r"^a \(RayError\) did not say within 60 s"),
        ({"a": None, "b": "late"}, ClusterError, "^b did not say within 60 s"),
        ({"a": "late", "b": "No such file"}, ConfigError, r"\(b: No such file\)"),  # for certain
    ],
)
def test_a_folder_that_a_node_does_not_see_is_refused_and_nothing_is_left_in_it(
    answers: dict[str, Any],
    error: type[Exception] | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []

    class Task:
        def options(self, scheduling_strategy: Any, **told: Any) -> Any:
            assert told == {"num_cpus": 0, "max_retries": 0}  # of a full node, and this one alone
            assert not scheduling_strategy.soft

            def remote(probe: str, token: str, late_s: float) -> str:
                asked.append((Path(probe).read_text() == token, late_s))
                return str(scheduling_strategy.node_id)[0]

            return SimpleNamespace(remote=remote)

    def wait(refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert (num_returns, timeout) == (2, 60.0)
        late = [ref for ref in refs if answers[ref] == "late"]
        return [ref for ref in refs if ref not in late], late

    def get(ref: str) -> Any:
        if isinstance(answers[ref], RayError):
            raise answers[ref]
        return answers[ref]

    monkeypatch.setattr(cluster, "_nodes", lambda compute: {"a" * 56: "a", "b" * 56: "b"})
    monkeypatch.setattr(ray, "remote", lambda function: Task())
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    folder = tmp_path / "out"
    expects = pytest.raises(error, match=words) if error else contextlib.nullcontext()
    with expects:
        check_folder_is_shared(folder, ComputeConfig(address="auto"), late_s=3.0)
    assert asked == [(True, 3.0)] * 2
    assert list(folder.iterdir()) == []
    asked.clear()
    check_folder_is_shared(tmp_path / "mine", ComputeConfig())  # of this machine alone
    assert asked == []


@pytest.mark.parametrize(
    ("cores", "workers", "cpus"), [(1, None, 2), (1, 5, 5), (8, 2, 8), (None, None, 2)]
)
def test_a_private_ray_has_room_for_all_workers(
    cores: int | None, workers: int | None, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def started(*given: Any, **named: Any) -> Any:
        made.append((*given, named))
        return contextlib.nullcontext()

    monkeypatch.setattr(cluster.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(cluster, "private_ray", started)
    monkeypatch.setattr(cluster, "joined_ray", started)
    with ray_session(ComputeConfig(workers=workers)):
        assert made == [(cpus, {"object_store_memory": cluster.OBJECT_STORE_BYTES})]
    with ray_session(ComputeConfig(workers=workers, address="ray://h:1")):
        assert made[1:] == [("ray://h:1", "compute.address", {})]
