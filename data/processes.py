"""How worker processes of this folder start."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext


def worker_context() -> BaseContext:
    """A fork server: workers are forks of a clean process that has only imported.

    A fork of this process could hang in whatever its threads hold (torch, s3fs), and a spawned one
    imports torch anew, seconds for each worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.loader", "data.synthetic"])
    return context
