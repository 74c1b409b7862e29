"""Ranks of a training without Ray: processes of this host that talk over gloo."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from pipelines.training.zero.inside import import_deepspeed


def on_ranks(world: int, function: Callable[[int, Path], None], folder: Path) -> None:
    """Forked, so that ranks begin at once, with all that this process has imported."""
    import_module("torch._dynamo")  # seconds, which each rank's first optimizer would take
    import_deepspeed()
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (world, function, folder, meeting)
        multiprocessing.start_processes(_rank, arguments, nprocs=world, start_method="fork")


def _rank(
    rank: int, world: int, function: Callable[[int, Path], None], folder: Path, meeting: str
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as tests/conftest.py, of what `on_ranks` has imported since
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/rendezvous", rank=rank, world_size=world
    )
    try:
        function(rank, folder)
    finally:
        distributed.destroy_process_group()
    # Not by way of the interpreter's end: DeepSpeed keeps the process group, whose gloo thread may
    # still have to let go of the last collective's tensors, and aborts where it no longer can.
    os._exit(0)
