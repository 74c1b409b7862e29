"""Tokens, settings, capacity and pacing."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from infra.runtime.errors import UserError
from infra.runtime.ray import ClusterError
from serve.admission.admission import Sizes
from serve.delivery.pacing import PacedOutbox
from serve.editor.capacity import Capacity
from serve.hub.records import Entry
from serve.run import free_port, start
from serve.settings import ServeSettings
from serve.wire.protocol import WireError
from serve.wire.work import Opening
from tests.serve.front.clock import JumpingLoop


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
        capacity.observe(Sizes((128, 192), (128, 192), "off"), 0.21)
    # A chunk lasts 0.75 s at 16 frames a second: a session is 28 % of the accelerator.
    first = capacity.admit(opening("a"))
    capacity.admit(opening("b"))
    assert capacity.load == pytest.approx(0.56)
    with pytest.raises(WireError, match="28%") as raised:
        capacity.admit(opening("c"))
    assert raised.value.code == "at_capacity"
    assert raised.value.retry_after_s
    capacity.admit(opening("half the rate", fps=8.0))
    capacity.release(first)
    capacity.admit(opening("a quarter of the size", (64, 96)))


def test_the_first_session_is_always_admitted_and_the_count_is_bounded() -> None:
    capacity = Capacity(chunk_frames=12, max_sessions=2)
    capacity.observe(Sizes((128, 192), (128, 192), "off"), 5.0)
    capacity.admit(opening("slow machine"))
    with pytest.raises(WireError):
        capacity.admit(opening("second"))
    counted = Capacity(chunk_frames=12, max_sessions=2, measured=False)
    counted.observe(Sizes((128, 192), (128, 192), "off"), 5.0)
    counted.admit(opening("a"))
    counted.admit(opening("b"))
    with pytest.raises(WireError):
        counted.admit(opening("c"))


@pytest.mark.anyio
async def test_live_frames_leave_no_faster_than_the_source() -> None:
    outbox = PacedOutbox(mode="live", fps=100.0)
    times: list[float] = []

    async def send(data: str | bytes) -> None:
        times.append(time.monotonic())

    outbox.put([Entry(n, b"frame") for n in range(10)] + [Entry(10, "chunk")])
    outbox.end()
    sent: list[int] = []
    await asyncio.wait_for(outbox.run(send, lambda: sent.append(1)), 20)
    assert len(times) == 11
    assert len(sent) == 10
    assert times[9] - times[0] >= 9 * 0.01 * 0.95
    assert outbox.stuck_s == 0


def played(monkeypatch: pytest.MonkeyPatch, *chunks: tuple[float, float]) -> np.ndarray:
    """When each frame left, [chunks, 10]: ten frames a second, ten a chunk; `chunks` are when one
    was ready and when its last source frame had come."""
    left: list[float] = []

    async def play() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr("serve.delivery.pacing.time", SimpleNamespace(monotonic=loop.time))
        outbox = PacedOutbox(mode="live", fps=10.0)

        async def send(data: str | bytes) -> None:
            left.append(loop.time())

        running = asyncio.create_task(outbox.run(send, lambda: None))
        for ready, arrived in chunks:
            await asyncio.sleep(ready - loop.time())
            outbox.put([Entry(n, b"frame") for n in range(10)], arrived)
        outbox.end()
        await running

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(play())
    return np.reshape(left, (-1, 10))


def test_a_steady_stream_is_even(monkeypatch: pytest.MonkeyPatch) -> None:
    left = played(monkeypatch, (100.5, 100.0), (101.5, 101.0), (102.5, 102.0))
    assert np.diff(left.flat) == pytest.approx(0.1)


def test_a_late_chunk_is_played_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    left = played(monkeypatch, (100.5, 100.0), (101.7, 101.0), (102.5, 102.0))
    assert left[:, 0] == pytest.approx([100.5, 101.7, 102.5])
    assert np.diff(left[1]) == pytest.approx(0.08)


def test_a_chunk_that_is_quicker_than_all_before_hardly_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = played(monkeypatch, (100.5, 100.0), (101.46, 101.0), (102.28, 102.0))
    assert left[1, 0] == pytest.approx(101.46)
    # The one before has a frame left when it comes: both go out half an interval apart.
    assert left[1, -3:] == pytest.approx([102.16, 102.26, 102.31])
    assert left[2, 0] == pytest.approx(102.36)


@pytest.mark.anyio
async def test_an_outbox_says_how_long_its_client_is_stuck() -> None:
    outbox = PacedOutbox(mode="lossless", fps=16.0)
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


@pytest.mark.slow  # starts Ray
def test_a_ray_that_does_not_start_is_one_clear_error(small_model: Path) -> None:
    with pytest.raises(ClusterError, match="Ray did not start on this machine: ") as failed:
        start(ServeSettings(str(small_model)), port=free_port(), cpus=-1)
    assert not ray.is_initialized()
    logs = re.search(r"logs are in (\S+)/session_latest", failed.value.__notes__[0])
    assert logs
    shutil.rmtree(logs[1])


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.1", r"192.0.2.1:80\d* \(Cannot assign .*\); --host takes an address of this"),
        ("no.such.host.invalid", r"--host takes an address of this machine, or 0.0.0.0"),
    ],
)
def test_an_address_of_another_machine_is_no_port_that_is_taken(host: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        start(ServeSettings("none"), host=host, port=8000, cpus=1)


def test_who_has_a_port_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        who = rf"127.0.0.1:{port} \(.* with pid {os.getpid()} listens there\); stop that, or choose"
        with pytest.raises(UserError, match=who):
            start(ServeSettings("none"), host="127.0.0.1", port=port, cpus=1)
