from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from pipelines.stages.running.own_process import from_own_process


def numbers(count: int) -> Iterator[tuple[int, int]]:
    for number in range(count):
        yield number, os.getpid()


def fails() -> Iterator[int]:
    yield 1
    raise LookupError("no more than one")


def dies() -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_order_from_one_process_that_ends() -> None:
    results = list(from_own_process(partial(numbers, 3)))
    assert [number for number, _ in results] == [0, 1, 2]
    (pid,) = {pid for _, pid in results}
    assert pid != os.getpid()
    assert not runs(pid)


def test_a_process_that_nobody_asks_on_ends() -> None:
    results = from_own_process(partial(numbers, 10**9))
    _, pid = next(results)
    assert runs(pid)
    ended = threading.Thread(target=results.close, daemon=True)  # type: ignore[attr-defined]
    ended.start()
    ended.join(20)
    assert not ended.is_alive()
    assert not runs(pid)


def test_its_error_is_ours() -> None:
    results = from_own_process(fails)
    assert next(results) == 1
    with pytest.raises(LookupError, match="no more than one"):
        next(results)


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="exit code -9"):
        list(from_own_process(dies))
