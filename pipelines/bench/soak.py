"""HeldMemory over a long run: what `liveedit bench serve --soak` looks at.

A process that keeps a little of every session is seen by nobody until the third night. Each
process's memory is sampled all the while; after a warm-up, in which caches fill, the middle of what
it held in the first third is set beside that in the last.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from infra.runtime.errors import UserError

WARM_UP = 0.2  # of the time
FLAT = 0.02  # a process may have grown by so much of what it held
LEAST = 8 * 2**20  # bytes of growth that are the allocator's, whatever the process holds
OURS = re.compile(r"ray::(?:ServeReplica:\w+:)?(editor|front|Hub|ProxyActor|ServeController)")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """Of "90s", "30m" or "2h". Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found or not float(found[1]):
        raise UserError(f"--soak {text} must be a time, such as 90s, 30m or 2h")
    return float(found[1]) * UNITS[found[2]]


def processes() -> dict[str, psutil.Process]:
    """Of the application that this process started, by what they are and their id."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            name = OURS.match(" ".join(child.cmdline()))
        except psutil.Error:
            continue  # it ended meanwhile
        if name:
            found[f"{name[1].lower()} {child.pid}"] = child
    return found


@dataclass
class HeldMemory:
    """Resident bytes of each process, over time."""

    began: float = field(default_factory=time.monotonic)
    samples: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def sample(self) -> None:
        for name, process in processes().items():
            try:
                held = process.memory_info().rss
            except psutil.Error:
                continue
            self.add(name, self.seconds, held)

    def add(self, name: str, at: float, held: int) -> None:
        self.samples.setdefault(name, []).append((at, held))

    def growth(self) -> list[dict[str, Any]]:
        """For each process that was there all the while: bytes in the first and the last third
        after the warm-up, and whether that is flat."""
        end = max((at for found in self.samples.values() for at, _ in found), default=0.0)
        third = (1 - WARM_UP) * end / 3
        rows = []
        for name, found in self.samples.items():
            first = [held for at, held in found if WARM_UP * end <= at <= WARM_UP * end + third]
            last = [held for at, held in found if at >= end - third]
            if first and last:
                before, after = statistics.median(first), statistics.median(last)
                flat = after - before <= max(LEAST, FLAT * before)
                rows.append({"process": name, "first": before, "last": after, "flat": flat})
        return rows
