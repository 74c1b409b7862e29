"""Who works through the pairs; a cluster that does is in tests/pipelines/test_cluster.py."""

from __future__ import annotations

import os
from functools import partial

import pytest

from infra.runtime.ray import ClusterError
from pipelines.stages.ingest import workforce


def test_without_a_cluster_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with workforce(None) as (_, place):
        assert place == f"{len(os.sched_getaffinity(0))} processes"
    for asked, workers in ((1, 0), (3, 3)):  # one process is this one
        with workforce(asked) as (mapper, _):
            assert isinstance(mapper, partial)
            assert mapper.keywords == {"workers": workers}
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with workforce(3) as (_, place):
        assert place == "3 processes"
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS=127\.0\.0\.1:1"), workforce(None):
        pass
