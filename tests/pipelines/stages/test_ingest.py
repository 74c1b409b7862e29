"""Who works through the pairs; a cluster that does is in tests/pipelines/test_cluster.py."""

from __future__ import annotations

import os

import pytest

from infra.runtime.ray import ClusterError
from pipelines.stages.ingest import workforce


def test_without_a_cluster_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with workforce(None) as (_, place):
        assert place == f"{len(os.sched_getaffinity(0))} processes"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with workforce(3) as (_, place):
        assert place == "3 processes"
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS=127\.0\.0\.1:1"), workforce(None):
        pass
