"""Results, one after the other, out of a process of their own.

With it goes all that it held: a GPU's driver keeps what a process has taken of it until the process
ends, whatever the process itself lets go.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")


def from_own_process(make: Callable[[], Iterator[T]]) -> Iterator[T]:
    """What `make()` yields, in a new process, which ends with it or when nobody asks on.

    `make` and its results are pickled. Raises what `make` raises, and RuntimeError for a process
    that dies.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(make, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            try:
                kind, value = ours.recv()
            except EOFError:
                process.join()
                raise RuntimeError(
                    f"the process that should have worked ended with exit code {process.exitcode}; "
                    "was it killed, or out of memory?"
                ) from None
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        process.kill()
        process.join()
        ours.close()


def _send(make: Callable[[], Iterator[Any]], pipe: Connection) -> None:
    try:
        for result in make():
            pipe.send(("result", result))
        pipe.send(("end", None))
    except Exception as error:
        pipe.send(("error", error))
