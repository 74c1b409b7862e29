"""Who works through the pairs; a cluster that does is in tests/pipelines/test_cluster.py."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from data.pairs import LeftOut
from infra.runtime.errors import UserError
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


class Cluster:
    """Does a task when its result is asked for; `most` were ever under way at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked = self.answered = self.most = 0
        patch.setattr(ray, "remote", lambda **how: self.of)
        patch.setattr(ray, "get", self.get)

    def of(self, work: Callable[..., Any]) -> Any:
        def remote(*given: Any) -> Any:
            self.asked += 1
            self.most = max(self.most, self.asked - self.answered)
            return partial(work, *given)

        return SimpleNamespace(remote=remote)

    def get(self, task: Callable[[], Any]) -> Any:
        self.answered += 1
        return task()


def missing(path: Path, reason: str) -> Callable[[Any], Any]:
    return lambda task: LeftOut(task, str(path), reason)


def test_a_cluster_s_results_come_in_order_so_many_at_a_time_and_lost_ones_in_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task whose worker crashes or runs out of memory stops none of the others."""
    cluster = Cluster(monkeypatch)

    def work(task: Any) -> Any:
        if task == 2:
            raise ray.exceptions.WorkerCrashedError
        if task == 5:
            raise ray.exceptions.OutOfMemoryError("full")
        return 10 * task

    results: Any = ingest.on_ray(work, range(8), window=3, crashed=lambda task: -task)  # type: ignore[type-var]
    assert list(results) == [0, 10, -2, 30, 40, -5, 60, 70]
    assert (cluster.asked, cluster.most) == (8, 3)


@pytest.mark.parametrize(
    ("there", "reason", "refused"),
    [
        (True, "no such file", True),
        (True, "damaged", False),  # which it is here, too
        (False, "no such file", False),
    ],
)
def test_a_file_of_this_machine_that_the_cluster_cannot_see_ends_it_all(
    there: bool, reason: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster(monkeypatch)
    file = tmp_path / "in.mp4"
    if there:
        file.touch()
    work: Any = missing(file, reason)
    results: Any = ingest.on_ray(work, [3], window=1, crashed=work)
    if not refused:
        assert list(results) == [work(3)]
        return
    told = rf"{file} lies on this machine and cannot be seen from {socket.gethostname()}; .*mount"
    with pytest.raises(UserError, match=told):
        list(results)
