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
