"""How worker processes of this folder start."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import BaseContext


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
    os.environ.clear()
    os.environ.update(environment)
