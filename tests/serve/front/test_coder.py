"""Which images a session gets for its edited frames, and how often they are made."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from serve.front.coder import FrameCoder
from serve.wire import codec

pytestmark = pytest.mark.anyio


class Counting(ThreadPoolExecutor):
    def __init__(self) -> None:
        super().__init__(2)
        self.asked = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        self.asked += 1
        return super().submit(function, *args, **named)


def chunk(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 16, 24, 3), dtype=np.uint8)


def coded(frames: np.ndarray) -> list[bytes]:
    return [codec.encode(frame, "jpeg") for frame in frames]


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
