"""A stage's metrics, from the device to a report."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from pipelines.training.methods.base import Setting
from pipelines.training.run_folder import RunFolder, TrainingError, TrainingReport
from pipelines.training.watch.speed import Speed
from pipelines.training.watch.system import system_metrics


class Meter:
    """Means of metrics over steps and workers, and the guard against losses that are not finite.

    Everything stays on the device until a report, so a step never waits for the host. A report
    also says how fast it goes (`speed`).
    """

    def __init__(self, setting: Setting, folder: RunFolder, resumed: bool) -> None:
        self.setting = setting
        self.folder = folder
        self.last: dict[str, float] = {}
        self.rates: dict[str, float] = {}  # of every network
        self.speed = Speed(setting.device)
        self._resumed = resumed
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=setting.device)
        self._clear()

    def _clear(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self.speed.clear()
        self._steps: set[int] = set()

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """For what is done between two steps and is no part of either."""
        began = time.monotonic()
        yield
        self.speed.began += time.monotonic() - began

    def add(self, metrics: dict[str, Tensor], step: int) -> None:
        self._steps.add(step)
        for name, value in metrics.items():
            self._values[name].append(value.detach().float())
            bad = ~torch.isfinite(value).all() & (self._first_bad < 0)
            self._first_bad = torch.where(bad, step, self._first_bad)

    def report(self, done: int, learning_rate: float) -> None:
        """Average, check and write down; a collective.

        Raises TrainingError if any loss or gradient norm since the last report was not finite, so
        that no such state is ever saved.
        """
        speed, steps = self.speed, max(1, len(self._steps))
        told = torch.tensor(
            [speed.waited / steps, speed.saved / steps, speed.held_gib()], dtype=torch.float64
        )
        worst = torch.cat([self._first_bad[None].double(), told.to(self._first_bad.device)])
        distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
        first_bad, waited, saved, held = worst.tolist()
        if first_bad >= 0:
            stage = self.setting.stage
            raise TrainingError(
                f"stage {stage}: the loss or gradient norm is not finite at step "
                f"{int(first_bad) + 1} on at least one worker; lower {stage}.learning_rate or "
                f"{stage}.grad_clip, or look for broken pairs in the dataset"
            )
        means = torch.stack([torch.stack(values).mean() for values in self._values.values()])
        distributed.all_reduce(means)
        means = means / self.setting.world_size
        self.last |= dict(zip(self._values, means.tolist(), strict=True))
        seconds = speed.seconds(steps)
        if self.setting.rank == 0:
            metrics = {
                **self.last,
                "learning_rate": learning_rate,
                **(self.rates if len(self.rates) > 1 else {}),
                "seconds_per_step": seconds,
                "data_seconds_per_step": waited,
                "save_seconds_per_step": saved,
                **speed.figures(steps, seconds),
                **({"gpu_memory_gib": held} if held else {}),
            }
            all_steps = self.setting.section.steps
            self.folder.report(
                TrainingReport(
                    done,
                    all_steps,
                    metrics,
                    seconds,
                    pid=os.getpid(),
                    resumed=self._resumed,
                    system=system_metrics(self.setting.device, self.folder.path),
                )
            )
        self._resumed = False
        self._clear()
