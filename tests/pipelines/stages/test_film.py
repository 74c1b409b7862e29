"""A file that is filmed by a camera which drops what it is told to: what film comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data.video import probe, read_frames
from pipelines.stages.edit_remote import film_file, live_numbers
from serve.client import EditedFrame
from serve.client.cameras import CameraLoad, CameraReport
from serve.wire import codec
from tests.known_editors import block_clip
from tests.pipelines.stages.test_edit_file import assert_same, exact, read


@pytest.mark.parametrize(
    ("came", "shown"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([0, 1, 4, 5], [0, 1, 4, 4, 4, 5]),
        ([0, 1], [0, 1, 1, 1, 1, 1]),
        ([3, 5], [3, 3, 3, 3, 5, 5]),
        ([], [None] * 6),
    ],
)
def test_where_frames_were_dropped_another_stands_and_the_film_is_as_long(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    came: list[int],
    shown: list[int | None],
) -> None:
    """A camera that drops what it is told to: no server can be made to do so on time."""
    video = block_clip(6, 48, 64)
    source, out = exact(tmp_path / "in.mkv", video, Fraction(12)), tmp_path / "out.mp4"
    filmed: list[tuple[CameraLoad, np.ndarray, str]] = []

    async def camera(
        url: str,
        load: CameraLoad,
        images: list[bytes],
        prompt: str,
        *,
        on_frame: Callable[[EditedFrame], None],
    ) -> CameraReport:
        pixels = np.stack([codec.decode(image, "jpeg", width=64, height=48) for image in images])
        filmed.append((load, pixels, prompt))
        for index in came:
            on_frame(EditedFrame(index, 0, codec.encode(video[index], "png"), "png", (64, 48), 0.0))
        return CameraReport(sent=6, edited=len(came), dropped=6 - len(came))

    def at_a_rate(path: Path, *, fps: Fraction) -> Iterator[np.ndarray]:
        assert fps == 12  # a camera's is constant, a file's need not be
        return read_frames(path, fps=fps)

    monkeypatch.setattr("pipelines.stages.edit_remote.camera", camera)
    monkeypatch.setattr("pipelines.stages.edit_remote.read_frames", at_a_rate)
    heard: list[int] = []
    film_file("ws://there", source, out, "paint it", progress=heard.append)
    black = np.zeros_like(video[0])
    assert_same(read(out), np.stack([black if n is None else video[n] for n in shown]))
    assert heard == [index + 1 for index in came]
    assert probe(out).fps == 12
    ((load, pixels, prompt),) = filmed
    assert (load.width, load.height, load.fps, load.seconds) == (64, 48, 12.0, 0.5)
    assert (load.mode, load.format, prompt) == ("live", "jpeg", "paint it")
    assert_same(pixels, video)


def test_a_stream_that_the_server_ends_leaves_no_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def camera(*arguments: object, **named: object) -> CameraReport:
        return CameraReport(error="draining")

    monkeypatch.setattr("pipelines.stages.edit_remote.camera", camera)
    source = exact(tmp_path / "in.mkv", block_clip(3, 48, 64))
    with pytest.raises(ValueError, match="ws://there: the stream ended: draining"):
        film_file("ws://there", source, tmp_path / "out.mp4", "x")
    assert not (tmp_path / "out.mp4").exists()


def test_a_viewer_s_numbers_by_hand() -> None:
    report = CameraReport(
        first_chunk_ms=1500.0,
        latency_ms=[900.0, 100.0, 300.0],
        interval_ms=[50.0, 150.0],
        edited=20,
        dropped=3,
    )
    assert live_numbers(report) == {
        "edited": 20.0,
        "dropped": 3.0,
        "first_chunk_s": 1.5,
        "latency_s": 0.3,
        "fps": 10.0,
    }
    assert live_numbers(CameraReport()) == {"edited": 0.0, "dropped": 0.0}
