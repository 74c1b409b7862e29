"""Who comes, when, for how long, and what an editor has to do for them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from modeling.detail.work_size import in_words
from pipelines.bench.simulation.day import Day, busy
from serve.admission.admission import Request
from serve.wire.protocol import Mode
from serve.wire.work import Opening

SESSION_S = 600.0  # median of a session's length; lengths are log-normal
SESSION_SPREAD = 1.0  # of their logarithm
COST_SPREAD = 0.2  # of the logarithm of what a session's chunks cost: scenes differ
WAITS = 0.5  # share of clients that wait in the queue


@dataclass
class Client:
    number: int
    length_s: float
    cost_s: float  # what its chunks really cost
    waits: bool
    asked: float
    live: bool = True
    opened: float | None = None
    epoch: int = 0
    again: bool = False
    editor: str = ""  # where it is; "" for nowhere
    model: str = ""  # key of its version; "" before it has one
    _stream: tuple[int, str] = (-1, "")

    @property
    def session(self) -> str:
        return f"s{self.number}"

    @property
    def stream(self) -> str:
        if self._stream[0] != self.epoch:
            self._stream = self.epoch, f"{self.number}.{self.epoch}"
        return self._stream[1]

    def request(self, day: Day) -> Request:
        sizes = replace(day.sizes, model=self.model)
        return Request(
            self.stream, self.session, sizes, day.fps, self.epoch, self.waits, self.again,
            self.live, NAME if self.model else "",
        )  # fmt: skip

    def opening(self, day: Day) -> Opening:
        (height, width), work = day.sizes.frame, in_words(day.sizes.work)
        mode: Mode = "live" if self.live else "lossless"
        return Opening(
            self.session, "", width, height, day.fps, mode, stream=self.stream, work_size=work,
            version=self.model,
        )  # fmt: skip


NAME = "model"  # that all of them choose


def arrivals(day: Day, warm_s: float, draw: random.Random) -> Iterator[Client]:
    """From `warm_s` before the day to its end: a Poisson process that follows the day, thinned from
    the rate of the busiest hour."""
    length = SESSION_S * math.exp(SESSION_SPREAD**2 / 2)  # mean
    numbers, now, end = itertools.count(), 0.0, warm_s + day.hours * 3600
    while (now := now + draw.expovariate(day.sessions / length)) < end:
        if draw.random() < busy(now - warm_s):
            yield Client(
                next(numbers),
                draw.lognormvariate(math.log(SESSION_S), SESSION_SPREAD),
                day.cost_s * draw.lognormvariate(-(COST_SPREAD**2) / 2, COST_SPREAD),
                draw.random() < WAITS,
                now,
                draw.random() >= day.lossless,
            )
