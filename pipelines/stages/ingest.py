"""Real pairs into a dataset on all cores of this machine, or of the cluster RAY_ADDRESS names."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data.ingest import Mapper, Result, Task
from data.pairs import LeftOut
from data.processes import map_in_order
from infra.runtime.environment import variable
from infra.runtime.errors import UserError
from infra.runtime.ray import joined_ray


@contextmanager
def workforce(workers: int | None) -> Iterator[tuple[Mapper, str]]:
    """Something to work through pairs with, and what to call it.

    `workers` processes here; None is the cluster of RAY_ADDRESS, or all cores. Raises ClusterError.
    """
    address = variable("RAY_ADDRESS")
    if workers is None and address is not None:
        with joined_ray(address, "RAY_ADDRESS"):
            import ray

            cpus = int(ray.cluster_resources().get("CPU", 1))
            yield partial(on_ray, window=2 * cpus), f"{cpus} cores of the Ray cluster at {address}"
        return
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    # One process is this one.
    yield partial(map_in_order, workers=0 if count == 1 else count), f"{count} processes"


def on_ray(
    function: Callable[[Task], Result],
    items: Iterable[Task],
    *,
    window: int,
    crashed: Callable[[Task], Result],
) -> Iterator[Result]:
    """`function` of each task as a Ray task of one core, in their order, `window` at a time.

    Raises UserError when a file of this machine cannot be seen by another.
    """
    import ray

    # One that takes its worker down is tried again once: it may have been another's memory.
    remote = ray.remote(num_cpus=1, max_retries=1)(_named)
    remaining = iter(items)
    waiting: deque[tuple[Task, Any]] = deque()
    while True:
        for task in remaining:
            waiting.append((task, remote.remote(function, task)))
            if len(waiting) >= window:
                break
        if not waiting:
            return
        task, reference = waiting.popleft()
        try:
            node, result = ray.get(reference)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            yield crashed(task)
            continue
        if isinstance(result, LeftOut) and Path(result.path).is_file() and _unseen(result):
            raise UserError(
                f"{result.path} lies on this machine and cannot be seen from {node}; put the pairs "
                "on storage that all machines of the cluster mount, or set --workers to work here"
            )
        yield result


def _named(function: Callable[[Task], Result], task: Task) -> tuple[str, Result]:
    import socket

    return socket.gethostname(), function(task)


def _unseen(left_out: LeftOut) -> bool:
    return left_out.reason.startswith("no such file")
