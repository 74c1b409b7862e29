"""Marks in time, on a CPU."""

from __future__ import annotations

import pytest
import torch

from modeling.streaming.device import DeviceClock


def test_between_two_marks_are_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 100.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = DeviceClock(torch.device("cpu"))
    start, end = clock.mark(), clock.mark()
    clock.wait(end)
    assert clock.between(start, end) == 250.0


def test_on_a_gpu_marks_are_events_that_keep_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            said.append(enable_timing)

        def record(self) -> None:
            said.append("recorded")

        def synchronize(self) -> None:
            said.append(self)

        def elapsed_time(self, end: object) -> float:
            return 2.5 if end is marks[1] and self is marks[0] else -1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = DeviceClock(torch.device("cuda"))
    marks = [clock.mark(), clock.mark()]
    assert said == 2 * [True, "recorded"]
    clock.wait(marks[1])
    assert said[-1] is marks[1]
    assert clock.between(*marks) == 2.5
