"""A long and bad line, where the kernel has no netem: passes frames between two TAP devices.

Each frame is late by a time of its own way and may be lost. A TAP offers no offloads, so that the
kernel cuts and checks packets before they come here. Ends with its standard input, and then says
how many frames it passed on and how many it lost.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
FRAME = 65536  # bytes, more than any that comes


def tap(name: str) -> int:
    """A file descriptor of a new device, which goes with it."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


class Line:
    """Frames on their way, in the order in which they arrive."""

    def __init__(self, delay_s: float, loss: float, seed: int = 0) -> None:
        self.delay_s, self.loss, self.passed, self.lost = delay_s, loss, 0, 0
        self._draw, self._order = random.Random(seed), itertools.count()
        self._waiting: list[tuple[float, int, int, bytes]] = []

    def send(self, to: int, frame: bytes, now: float) -> None:
        if self._draw.random() < self.loss:
            self.lost += 1
            return
        heapq.heappush(self._waiting, (now + self.delay_s, next(self._order), to, frame))

    def arrived(self, now: float) -> list[tuple[int, bytes]]:
        found = []
        while self._waiting and self._waiting[0][0] <= now:
            _, _, to, frame = heapq.heappop(self._waiting)
            found.append((to, frame))
        self.passed += len(found)
        return found

    def wait_s(self, now: float) -> float | None:
        """Until the next one arrives; None: nothing is on its way."""
        return max(0.0, self._waiting[0][0] - now) if self._waiting else None


def relay(ends: tuple[int, int], line: Line, until: int) -> None:
    """Until there is something to read from `until`."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    while True:
        ready, _, _ = select.select([*ends, until], [], [], line.wait_s(time.monotonic()))
        if until in ready:
            return
        for end in ready:
            try:
                while True:
                    line.send(other[end], os.read(end, FRAME), time.monotonic())
            except BlockingIOError:
                pass
        for to, frame in line.arrived(time.monotonic()):
            os.write(to, frame)


if __name__ == "__main__":
    devices = tap(sys.argv[1]), tap(sys.argv[2])
    print("laid", flush=True)
    way = Line(float(sys.argv[3]), float(sys.argv[4]))
    relay(devices, way, sys.stdin.fileno())
    print(way.passed, way.lost, flush=True)
