"""How worker processes of this folder start, and work that is spread over them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.context import BaseContext
from typing import TypeVar

from infra.runtime.environment import become

T = TypeVar("T")
R = TypeVar("R")

FROM_TERMINALS = (signal.SIGINT, signal.SIGHUP)
ENDINGS = (*FROM_TERMINALS, signal.SIGTERM)  # which may be KeyboardInterrupts here
LOOK_S = 0.2  # between looks at whether who works on what is waited for is alive


def worker_context() -> BaseContext:
    """A fork server: workers are forks of a clean process that has only imported.

    A fork of this process could hang in whatever its threads hold (torch, s3fs), and a spawned one
    imports torch anew, seconds for each worker.

    A terminal sends Ctrl-C and its own end to all of them. Both are this process's to hear, which
    ends its workers: server and workers would be interrupted anywhere, also in what they import.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.loader", "data.synthetic"])
    multiprocessing.resource_tracker.ensure_running()  # which ends with nothing blocked
    with _undisturbed():
        multiprocessing.forkserver.ensure_running()
    return context


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What asks this process to end comes afterwards; who starts meanwhile never hears a terminal.

    The mask is what those inherit. It is this thread's alone, and the system gives a signal to any
    thread that takes it, for whom the main thread is interrupted: there, handlers keep it as well.
    """
    heard: list[int] = []
    handlers = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_TERMINALS)
    try:
        if threading.current_thread() is threading.main_thread():
            for number in ENDINGS:
                if (handler := signal.getsignal(number)) is not None:  # else not of Python's making
                    handlers[number] = handler
                    signal.signal(number, lambda number, _: heard.append(number))
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # what it kept back is heard here
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # a handler may raise: after all are back
        try:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for again in heard:
            signal.raise_signal(again)


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

    At most two items a worker are under way besides the one that is waited for, which bounds the
    memory. `crashed` says what becomes of an item that takes its process down (a decoder that
    crashes, one that eats all memory); without it that is the pool's error. Who stops asking waits
    for nothing that is under way.
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
                waiting.append((item, _submit(pool, function, item)))  # type: ignore[arg-type]
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                result = _result(pool, future)
            except BrokenProcessPool:
                if crashed is None:
                    raise
                # Whichever it was, all that were under way are lost: each once more, alone.
                _end(pool)
                lost = [item, *(item for item, _ in waiting)]
                waiting.clear()
                yield from _one_by_one(function, lost, crashed)
                pool = _pool(workers)
                continue
            yield result
    finally:
        _end(pool)


_END = object()


def _one_by_one(
    function: Callable[[T], R], items: list[T], crashed: Callable[[T], R]
) -> Iterator[R]:
    pool = _pool(1)
    try:
        for item in items:
            try:
                result = _result(pool, _submit(pool, function, item))
            except BrokenProcessPool:
                _end(pool)
                pool = _pool(1)
                result = crashed(item)
            yield result
    finally:
        _end(pool)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = worker_context()
    # The server imports for seconds and starts nobody meanwhile: here this may be interrupted.
    context.Process(target=_nothing, daemon=True).start()  # type: ignore[attr-defined]
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)


def _nothing() -> None:
    pass


def _submit(pool: ProcessPoolExecutor, function: Callable[[T], R], item: T) -> Future[R]:
    """Undisturbed: half a start would leave a worker that nobody knows of."""
    with _undisturbed():
        return pool.submit(function, item)


def _result(pool: ProcessPoolExecutor, future: Future[R]) -> R:
    """Raises BrokenProcessPool when a worker has died, in whatever it was at.

    The pool sees that by itself unless it waits for the rest of what the dead one was sending.
    """
    while not wait_for([future], LOOK_S).done:
        workers = list((pool._processes or {}).values())
        if wait_for_any([worker.sentinel for worker in workers], 0):
            _end(pool)
            raise BrokenProcessPool("a worker died while it sent its result")
    return future.result()


def _end(pool: ProcessPoolExecutor) -> None:
    """Without waiting for what is under way: nobody wants it any more."""
    # Who is killed while it sends leaves half a result, for whose rest the pool would wait as long
    # as there is a writer: this process is one.
    if pool._result_queue is not None:
        pool._result_queue._writer.close()  # type: ignore[attr-defined]
    for process in list((pool._processes or {}).values()):  # Python 3.14 has kill_workers()
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Ends this worker with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
