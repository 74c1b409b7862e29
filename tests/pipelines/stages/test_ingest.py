"""pipelines/stages/ingest.py: pairs worked through by a Ray cluster, or by processes here."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from data.ingest import ingest
from data.manifest import dataset_hash, read_dataset_info
from infra.runtime.ray import ClusterError, joined_ray
from pipelines.stages.ingest import on_ray, workforce
from tests.data.test_ingest import make_list, pairs
from tests.data.workers import crash_at_five
from tests.serve.test_cluster import cluster  # noqa: F401  a fixture

pytestmark = pytest.mark.timeout(300)


def test_a_cluster_makes_the_same_dataset(tmp_path: Path, cluster: str) -> None:  # noqa: F811
    path = make_list(tmp_path, 5, bad=(3,))
    here, _ = ingest(pairs(path), str(tmp_path / "here"), samples_per_shard=2)
    arguments = ["--frames", "9", "--size", "48x32", "--samples-per-shard", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "data", "ingest", path, "there", *arguments],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": cluster, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    said = " ".join(run.stdout.split())
    assert f"5 pairs on 4 cores of the Ray cluster at {cluster}" in said
    assert "gone.mp4: no such file" in said
    there = read_dataset_info(str(tmp_path / "there"))
    assert dataset_hash(there) == dataset_hash(here)

    with joined_ray(cluster, "RAY_ADDRESS"):
        work = partial(on_ray, window=4)
        results = work(crash_at_five, range(8), crashed=lambda item: -item)  # type: ignore[arg-type, misc]
        assert list(results) == [n * n if n != 5 else -5 for n in range(8)]


def test_without_a_cluster_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with workforce(None) as (_, place):
        assert place == f"{len(os.sched_getaffinity(0))} processes"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with workforce(3) as (_, place):
        assert place == "3 processes"
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS=127\.0\.0\.1:1"), workforce(None):
        pass
