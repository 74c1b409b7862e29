"""SIGTERM to a worker's process: the state is saved before the process ends.

Ray's own answer is to end at once. Signals come to a process's main thread, where Ray Train runs
what its backend asks for, and not to the thread that trains.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ray.train.torch import TorchConfig

_told = threading.Event()
_Backend: Any = TorchConfig().backend_cls


def is_told_to_end() -> bool:
    """Whether this process has had a SIGTERM."""
    return _told.is_set()


def listen() -> None:
    """Keep SIGTERM for `is_told_to_end`; a second one ends the process as Ray would."""
    before: Any = signal.getsignal(signal.SIGTERM)

    def take(number: int, frame: FrameType | None) -> None:
        if _told.is_set():
            before(number, frame)
        _told.set()

    signal.signal(signal.SIGTERM, take)


class _ListeningBackend(_Backend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(listen)


@dataclass
class ListeningTorch(TorchConfig):
    """PyTorch's process group as Ray Train makes it, on workers that listen."""

    @property
    def backend_cls(self) -> type[_ListeningBackend]:
        return _ListeningBackend
