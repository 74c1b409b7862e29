"""Chunks on one accelerator, as the editor's scheduler orders them."""

from __future__ import annotations

import heapq
import random
from collections import deque

from pipelines.bench.simulation.day import Day

JITTER = 0.05  # of the logarithm of one chunk's cost among its session's


class LateShare:
    """Share of chunks that come too late on an accelerator, by its load and number of streams.

    Live chunks as the editor's scheduler runs them, earliest due first, each due when the next of
    its stream is there; streams begin at any moment. Four minutes of them, once for each pair.
    """

    SECONDS = 240.0

    def __init__(self, day: Day) -> None:
        self.period_s = day.chunk_frames / day.fps
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, load: float, streams: int) -> float:
        key = (round(load * 20), streams)
        if key not in self._known:
            self._known[key] = self._measure(key[0] / 20, streams)
        return self._known[key]

    def _measure(self, load: float, streams: int) -> float:
        if not streams or not load:
            return 0.0
        draw, cost = random.Random(streams), load * self.period_s / streams
        starts = [draw.uniform(0, self.period_s) for _ in range(streams)]
        chunks = range(int(self.SECONDS / self.period_s))
        jobs = deque(sorted(start + n * self.period_s for start in starts for n in chunks))
        free, late, done = 0.0, 0, 0
        waiting: list[float] = []  # when each is due
        while jobs or waiting:
            if not waiting:
                free = max(free, jobs[0])
            while jobs and jobs[0] <= free:
                heapq.heappush(waiting, jobs.popleft() + self.period_s)
            due = heapq.heappop(waiting)
            done += 1
            if free > due:  # too late before it began: a live stream drops it
                late += 1
                continue
            free += cost * draw.lognormvariate(0.0, JITTER)
            late += free > due
        return late / done
