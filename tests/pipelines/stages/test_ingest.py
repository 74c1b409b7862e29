"""Who works through the pairs; a cluster that does is in tests/pipelines/test_cluster.py."""

from __future__ import annotations

import contextlib
import os
from functools import partial

import pytest
import ray

from infra.runtime.ray import ClusterError
from pipelines.stages import ingest
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


def test_on_a_cluster_twice_as_many_pairs_are_under_way_as_it_has_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://h:1")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0})
    monkeypatch.setattr(ingest, "joined_ray", lambda *_: contextlib.nullcontext())
    with workforce(None) as (mapper, place):
        assert isinstance(mapper, partial)
        assert mapper.keywords == {"window": 12}
    assert place == "6 cores of the Ray cluster at ray://h:1"


def test_one_core_alone_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with workforce(None) as (mapper, place):
        assert isinstance(mapper, partial)
        assert (mapper.keywords, place) == ({"workers": 0}, "1 processes")
