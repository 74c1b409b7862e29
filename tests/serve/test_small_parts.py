"""Tokens, settings, capacity and pacing."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from serve.auth import allowed, read_tokens
from serve.capacity import Capacity
from serve.outbox import Outbox
from serve.protocol import WireError
from serve.run import StartError, free_port, start
from serve.session import Entry
from serve.settings import ServeSettings
from serve.work import Opening


def test_tokens_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# ours\n\n one \ntwo\n")
    assert read_tokens(file) == ("one", "two")
    file.write_text("# nobody\n")
    with pytest.raises(ValueError, match="holds no token"):
        read_tokens(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_tokens(tmp_path / "absent")


@pytest.mark.parametrize(
    ("header", "query", "right"),
    [
        ("Bearer one", "", True),
        ("bearer one", "", True),
        ("", "one", True),
        ("Basic one", "", False),
        ("Bearer on", "", False),
        ("Bearer wrong", "one", False),
        ("", "", False),
    ],
)
def test_who_is_let_in(header: str, query: str, right: bool) -> None:
    assert allowed(("zero", "one"), {"authorization": header}, {"token": query}) is right
    assert allowed((), {"authorization": header}, {"token": query})


def test_settings_name_what_is_wrong() -> None:
    made = ServeSettings.from_args({"model": "demo", "limits": {"max_fps": 30}, "editor_gpus": 1})
    assert made.limits.max_fps == 30
    for args, named in (
        ({}, "model"),
        ({"model": "demo", "port": 1}, "port"),
        ({"model": "demo", "max_sessions": "4"}, "max_sessions"),
        ({"model": "demo", "max_sessions": True}, "max_sessions"),
        ({"model": "demo", "limits": {"max_size": 1}}, "limits.max_size"),
    ):
        with pytest.raises(ValueError, match=named):
            ServeSettings.from_args(args)


def opening(name: str, size: tuple[int, int] = (128, 192), fps: float = 16.0) -> Opening:
    return Opening(name, "p", size[1], size[0], fps, "live")


def test_sessions_are_admitted_by_what_a_chunk_costs() -> None:
    capacity = Capacity(chunk_frames=12, max_sessions=8)
    for _ in range(50):
        capacity.observe((128, 192), 0.25)
    # A chunk lasts 0.75 s at 16 frames a second: a session is a third of the accelerator.
    capacity.admit(opening("a"))
    capacity.admit(opening("b"))
    assert capacity.load == pytest.approx(2 / 3)
    with pytest.raises(WireError, match="33%") as raised:
        capacity.admit(opening("c"))
    assert raised.value.code == "at_capacity"
    assert raised.value.retry_after_s
    capacity.admit(opening("half the rate", fps=8.0))
    capacity.release("a")
    capacity.admit(opening("a quarter of the size", (64, 96)))


def test_the_first_session_is_always_admitted_and_the_count_is_bounded() -> None:
    capacity = Capacity(chunk_frames=12, max_sessions=2)
    capacity.observe((128, 192), 5.0)
    capacity.admit(opening("slow machine"))
    with pytest.raises(WireError):
        capacity.admit(opening("second"))
    counted = Capacity(chunk_frames=12, max_sessions=2, measured=False)
    counted.observe((128, 192), 5.0)
    counted.admit(opening("a"))
    counted.admit(opening("b"))
    with pytest.raises(WireError):
        counted.admit(opening("c"))


@pytest.mark.anyio
async def test_live_frames_leave_no_faster_than_the_source() -> None:
    outbox = Outbox(mode="live", fps=100.0)
    times: list[float] = []

    async def send(data: str | bytes) -> None:
        times.append(time.monotonic())

    outbox.put([Entry(n, b"frame") for n in range(10)] + [Entry(10, "chunk")])
    outbox.end()
    sent: list[int] = []
    await outbox.run(send, lambda: sent.append(1))
    assert len(times) == 11
    assert len(sent) == 10
    assert times[9] - times[0] >= 9 * 0.01 * 0.95
    assert outbox.stuck_s == 0


@pytest.mark.anyio
async def test_a_delay_is_played_away(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    left: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    async def send(data: str | bytes) -> None:
        left.append(clock)

    monkeypatch.setattr("serve.outbox.time.monotonic", lambda: clock)
    monkeypatch.setattr("serve.outbox.asyncio.sleep", sleep)
    outbox = Outbox(mode="live", fps=10.0)
    outbox.put([Entry(n, b"frame") for n in range(10)])
    clock = 100.2  # the sender comes 0.2 s late, and the next chunk is ready on time
    outbox.put([Entry(n, b"frame") for n in range(10, 20)])
    outbox._batches[1].until = 102.0
    outbox.end()
    await outbox.run(send, lambda: None)
    assert left[0] == pytest.approx(100.2)
    assert left[10] == pytest.approx(101.0)
    assert left[19] == pytest.approx(101.9)
    gaps = np.diff(left)
    assert gaps[:9] == pytest.approx(0.08)
    assert gaps[10:] == pytest.approx(0.1)


@pytest.mark.anyio
async def test_no_chunk_waits_for_one_that_was_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    # A second of video each; the editor needs 0.5, 0.7 and 0.5 s after the last source frame.
    comes = {100.0: 99.5, 101.2: 100.5, 102.0: 101.5}
    left: list[float] = []
    turn = asyncio.sleep

    async def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    async def send(data: str | bytes) -> None:
        left.append(clock)

    monkeypatch.setattr("serve.outbox.time.monotonic", lambda: clock)
    monkeypatch.setattr("serve.outbox.asyncio.sleep", sleep)
    outbox = Outbox(mode="live", fps=10.0)
    running = asyncio.create_task(outbox.run(send, lambda: None))
    for number, (ready, arrived) in enumerate(comes.items()):
        clock = max(clock, ready)
        outbox.put([Entry(10 * number + n, b"frame") for n in range(10)], arrived)
        while len(left) < 10 * (number + 1):
            await turn(0)
    outbox.end()
    await running
    assert [left[0], left[10], left[20]] == pytest.approx(list(comes))
    assert np.diff(left)[:9] == pytest.approx(0.1)
    assert np.diff(left)[10:19] == pytest.approx(0.08)


@pytest.mark.anyio
async def test_an_outbox_says_how_long_its_client_is_stuck() -> None:
    outbox = Outbox(mode="lossless", fps=16.0)
    taken = asyncio.Event()

    async def send(data: str | bytes) -> None:
        await taken.wait()

    running = asyncio.create_task(outbox.run(send, lambda: None))
    await asyncio.sleep(0)
    assert outbox.stuck_s == 0
    outbox.put([Entry(0, b"frame")])
    await asyncio.sleep(0.05)
    assert outbox.stuck_s >= 0.04
    taken.set()
    outbox.end()
    await running
    assert outbox.stuck_s == 0


def test_a_ray_that_does_not_start_is_one_clear_error(small_model: Path) -> None:
    with pytest.raises(StartError, match=r"did not start: .*its logs are in") as failed:
        start(ServeSettings(str(small_model)), port=free_port(), cpus=-1)
    assert not ray.is_initialized()
    logs = re.search(r"in (\S+)/ray/session_latest", str(failed.value))
    assert logs
    shutil.rmtree(logs[1])
