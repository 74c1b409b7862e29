"""How worker processes of this folder start, and work that is spread over them."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import TypeVar

from infra.runtime.environment import become

T = TypeVar("T")
R = TypeVar("R")


def worker_context() -> BaseContext:
    """A fork server: workers are forks of a clean process that has only imported.

    A fork of this process could hang in whatever its threads hold (torch, s3fs), and a spawned one
    imports torch anew, seconds for each worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.loader", "data.synthetic"])
    return context


def adopt_environment(environment: dict[str, str], worker: int = 0) -> None:
    """Run first in a worker: the server that it was forked from may be older than a variable."""
    del worker
    become(environment)


def map_in_order(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    *,
    crashed: Callable[[T], R] | None = None,
) -> Iterator[R]:
    """`function` of each item, in their order, worked on by so many processes; 0 does it here.

    At most two items a worker are under way, which bounds the memory. `crashed` says what becomes
    of an item that takes its process down (a decoder that crashes, one that eats all memory);
    without it that is the pool's error.
    """
    if workers == 0:
        yield from map(function, items)
        return
    remaining = iter(items)
    waiting: deque[tuple[T, Future[R]]] = deque()
    pool = _pool(workers)
    try:
        while True:
            while len(waiting) <= 2 * workers and (item := next(remaining, _END)) is not _END:
                waiting.append((item, pool.submit(function, item)))  # type: ignore[arg-type]
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                if crashed is None:
                    raise
                # Whichever it was, all that were under way are lost: each once more, alone.
                pool.shutdown(wait=False, cancel_futures=True)
                lost = [item, *(item for item, _ in waiting)]
                waiting.clear()
                yield from _one_by_one(function, lost, crashed)
                pool = _pool(workers)
                continue
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_END = object()


def _one_by_one(
    function: Callable[[T], R], items: list[T], crashed: Callable[[T], R]
) -> Iterator[R]:
    pool = _pool(1)
    try:
        for item in items:
            try:
                result = pool.submit(function, item).result()
            except BrokenProcessPool:
                pool.shutdown()
                pool = _pool(1)
                result = crashed(item)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=worker_context(), initializer=_ignore_interrupt)


def _ignore_interrupt() -> None:
    """Ctrl-C is the parent's to hear: it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
