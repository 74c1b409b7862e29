"""Which nodes of a cluster are asked for the output's folder, and what each looks at."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipelines.config.stages import ComputeConfig
from pipelines.training import cluster
from pipelines.training.cluster import _nodes, _reads


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
