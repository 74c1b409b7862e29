"""One Ray for a whole pipeline: a private one, or a given cluster."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.runtime.ray import ClusterError, joined_ray, private_ray
from pipelines.config.merge import ConfigError
from pipelines.config.stages import ComputeConfig

OBJECT_STORE_BYTES = 256 << 20  # training hands over paths, not objects
ANSWER_S = 60.0  # for a node to start a process and look
LATE_S = 10.0  # until a network file system shows what another node wrote


@contextmanager
def ray_session(compute: ComputeConfig) -> Iterator[None]:
    """Ray for the training processes of `compute`. Raises ClusterError."""
    if compute.address is not None:
        with joined_ray(compute.address, "compute.address"):
            yield
        return
    cpus = max(os.cpu_count() or 1, compute.workers or 2)
    with private_ray(cpus, object_store_memory=OBJECT_STORE_BYTES):
        yield


def check_folder_is_shared(folder: Path, compute: ComputeConfig, late_s: float = LATE_S) -> None:
    """Raise a ConfigError if a node of the cluster that may get a worker of `compute` does not see
    `folder` as this process does, and a ClusterError if one does not say so within a minute. The
    Ray of this machine alone is not asked."""
    if compute.address is None:
        return
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder.mkdir(parents=True, exist_ok=True)
    probe, token = folder / f".seen-{secrets.token_hex(8)}", secrets.token_hex(16)
    read: Any = ray.remote(_reads)
    asked: dict[Any, str] = {}
    blind, silent = [], []
    try:
        probe.write_text(token)
        for node, name in _nodes(compute).items():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "scheduling_strategy": there, "max_retries": 0}
            asked[read.options(**options).remote(str(probe), token, late_s)] = name
        answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        silent = [asked[ref] for ref in late]
        for ref in answered:
            try:
                if why := ray.get(ref):
                    blind.append(f"{asked[ref]}: {why}")
            except RayError as error:
                silent.append(f"{asked[ref]} ({type(error).__name__})")
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"output={folder} is not seen by every node of the cluster ({'; '.join(blind)}); set "
            "output to a folder that all nodes see, such as a shared disk or a mounted bucket"
        )
    if silent:
        raise ClusterError(
            f"{', '.join(silent)} did not say within {ANSWER_S:g} s whether output={folder} is "
            "seen there; look at these nodes, or try again"
        )


def _nodes(compute: ComputeConfig) -> dict[str, str]:
    """Names of the nodes that may get a worker, by id, and of the one that Ray Train's controller
    runs on."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0) > 0 if compute.gpus is None else compute.gpus
    needed = {"CPU": compute.cpus_per_worker} | ({"GPU": 1.0} if gpus else {})
    own = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"]
        and (
            node["NodeID"] == own
            or all(node["Resources"].get(name, 0) >= count for name, count in needed.items())
        )
    }


def _reads(probe: str, token: str, late_s: float) -> str | None:
    """Why this node does not read `token` there; None if it does."""
    deadline = time.monotonic() + late_s
    while True:
        try:
            if Path(probe).read_text() == token:
                return None
            why = "another file lies there"
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            return why
        time.sleep(0.5)
