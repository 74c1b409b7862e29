"""What interrupts the steps: a save that is due, a stop, a machine that is about to leave."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import distributed

from pipelines.training.methods.base import Setting
from pipelines.training.run_folder import RunFolder

SAVE, STOP, ASK, LEAVE = 1, 2, 4, 8  # bits; of several workers' calls the largest is answered
ASK_SECONDS = 10.0  # between two questions whether a machine is about to leave, which take a while


class Calls:
    """Between two steps: must the state be saved, by the clock, because the driver is stopped, or
    because a machine is about to be taken away or a worker `told` to end?

    All workers get the same answer at the same step, one step after the call, so that none waits
    for a device that is busy with the step just begun.
    """

    def __init__(
        self,
        setting: Setting,
        folder: RunFolder,
        leaving: Callable[[], bool] | None = None,
        told: Callable[[], bool] = lambda: False,
    ) -> None:
        self.setting, self.folder, self.leaving, self.told = setting, folder, leaving, told
        self.seconds = 60 * setting.section.checkpoint_minutes
        self._last = torch.zeros((), dtype=torch.int64, device=setting.device)
        self._asked = time.monotonic()
        self._left = False  # saved for that: the machine goes, this process with it or without
        self.saved()

    def saved(self) -> None:
        self._since = time.monotonic()
        self._last.zero_()

    def after_step(self) -> int:
        """SAVE, STOP and LEAVE, or 0, the same on all workers; a collective."""
        call = 0
        if self.setting.rank == 0:
            now = time.monotonic()
            due = self.seconds > 0 and now - self._since >= self.seconds
            call = STOP if self.folder.is_to_stop() else SAVE if due else 0
            if self.leaving and not self._left and now - self._asked >= ASK_SECONDS:
                call, self._asked = call | ASK, now
        if self.told():
            call |= LEAVE
        last, self._last = self._last, torch.full_like(self._last, call)
        distributed.all_reduce(self._last, op=distributed.ReduceOp.MAX)
        answer = int(last)
        if answer & ASK and self.leaving and self.leaving():
            self._left = True
            answer |= LEAVE
        return answer & ~ASK
