"""Which images a session gets for its edited frames, and how often they are made."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest

from serve.front import coder
from serve.front.coder import FrameCoder
from serve.wire import codec
from serve.wire.protocol import Format

pytestmark = pytest.mark.anyio


class Counting(ThreadPoolExecutor):
    def __init__(self) -> None:
        super().__init__(1)
        self.jobs: list[Future[Any]] = []

    @property
    def asked(self) -> int:
        return len(self.jobs)

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        self.jobs.append(super().submit(function, *args, **named))
        return self.jobs[-1]


def chunk(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 16, 24, 3), dtype=np.uint8)


def coded(frames: np.ndarray, format: Format = "jpeg") -> list[bytes]:
    return [codec.encode(frame, format) for frame in frames]


async def test_frames_that_came_ahead_are_coded_once() -> None:
    with Counting() as codecs:
        made = FrameCoder(codecs, "jpeg")
        chunks = [chunk(n) for n in range(3)]
        made.begin(chunks[0])
        made.begin(chunks[1])  # while the first waits to be kept
        for frames in chunks:
            assert (await made.images(frames)).images == coded(frames)
        assert codecs.asked == 3


async def test_frames_of_an_editor_that_died_are_nobodys() -> None:
    with Counting() as codecs:
        made = FrameCoder(codecs, "jpeg")
        lost, again, after = chunk(0), chunk(1), chunk(2)
        made.begin(lost)
        made.begin(again)
        assert (await made.images(again)).images == coded(again)
        assert (await made.images(after)).images == coded(after)
        made.begin(chunk(3))
        made.close()


async def test_nobody_codes_what_nobody_will_ask_for() -> None:
    """Frames of an editor that died, or of a client that left: threads are for the others."""
    for left in (False, True):
        may = threading.Event()
        with Counting() as codecs:
            codecs.submit(may.wait)
            made = FrameCoder(codecs, "jpeg")
            lost, again = chunk(0), chunk(1)
            made.begin(lost)
            made.begin(again)
            await asyncio.sleep(0)
            asking = asyncio.create_task(made.images(again))
            await asyncio.sleep(0)
            if left:
                made.close()
                asking.cancel()
            for _ in range(3):
                await asyncio.sleep(0)
            may.set()
            if not left:
                assert (await asking).images == coded(again)
        assert [job.cancelled() for job in codecs.jobs] == [False, True, left]


@pytest.mark.parametrize(
    ("frames", "cores", "piece", "jobs"),
    [  # a frame has 384 pixels
        (4, 8, 384, 4),
        (4, 3, 384, 3),
        (2, 8, 96, 2),  # no thread has less than a frame
        (4, 8, 768, 2),
        (4, 8, 769, 1),
        (4, 8, 1536, 1),
        (4, 8, 10_000, 1),
        (0, 8, 384, 1),
    ],
)
async def test_a_chunk_is_divided_between_as_many_threads_as_pay(
    frames: int, cores: int, piece: int, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coder, "CORES", cores)
    monkeypatch.setattr(coder, "PIECE", piece)
    with Counting() as codecs:
        found = await FrameCoder(codecs, "jpeg").images(chunk(0, frames))
    assert codecs.asked == jobs
    assert found.images == coded(chunk(0, frames))


@pytest.mark.parametrize("format", get_args(Format))
async def test_the_images_are_the_sessions_and_say_when_they_were_made(format: Format) -> None:
    frames, before = chunk(0), time.monotonic()
    with Counting() as codecs:
        made = FrameCoder(codecs, format)
        made.begin(frames)
        await asyncio.sleep(0.002)
        asked = time.monotonic()
        found = await made.images(frames)
    assert found.images == coded(frames, format)
    assert before <= found.begun < asked
    assert found.begun < found.done <= time.monotonic()


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are Linux's")
def test_jpegs_are_made_in_a_file_so_that_other_threads_go_on() -> None:
    assert codec._memory_file().fileno() > 2


def test_a_threads_images_are_whole_each_whatever_was_made_before() -> None:
    """They share a file: what is left of a longer one is not of the next."""
    frames = [chunk(1)[0], np.zeros((16, 24, 3), np.uint8), chunk(2)[0]]
    for frame in frames:
        image = codec.encode(frame, "jpeg")
        assert image.startswith(b"\xff\xd8")
        assert image.endswith(b"\xff\xd9")
        assert image.count(b"\xff\xd8\xff\xe0") == 1
        shown = codec.decode(image, "jpeg", width=24, height=16)
        assert np.abs(shown.astype(int) - frame).mean() < 12


def test_no_descriptor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> int:
        raise OSError(24, "Too many open files")

    frame = chunk(1)[0]
    made = codec.encode(frame, "jpeg")
    monkeypatch.setattr(codec.os, "memfd_create", full, raising=False)
    monkeypatch.setattr(codec, "_files", threading.local())  # as of a thread that has none yet
    assert codec.encode(frame, "jpeg") == made
