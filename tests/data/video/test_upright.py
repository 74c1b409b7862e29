"""data/video/source/upright.py, decode.py: the picture upright, whole and with square pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.video import VideoWriter, differences, probe, read_frames, read_timed
from data.video.decode import _whole
from data.video.source.upright import FrameLook, look
from tests.data.conftest import MakeVideo, number_of, numbered, write_raw

ONE, UNIT = 1 << 16, 1 << 30


def cornered(height: int = 48, width: int = 64) -> np.ndarray:
    """Grey, with red in the upper left corner and green in the upper right one."""
    frame = np.full((height, width, 3), 90, np.uint8)
    frame[: height // 4, : width // 4] = (230, 20, 20)
    frame[: height // 4, -width // 4 :] = (20, 200, 20)
    return frame


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),  # a front camera's
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),  # mirrored and held upright
        ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    ],
)
def test_all_eight_orientations(
    tmp_path: Path, matrix: tuple[int, int, int, int], turn: object
) -> None:
    """By ISO 14496-12: a point (p, q) is shown at (a p + c q, b p + d q)."""
    path = write_raw(tmp_path / "a.mp4", np.repeat(cornered()[None], 3, axis=0))
    data = path.read_bytes()
    place = data.index(struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, UNIT), data.index(b"tkhd"))
    a, b, c, d = (ONE * number for number in matrix)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, UNIT)
    path.write_bytes(data[:place] + turned + data[place + 36 :])
    shown, info = next(read_frames(path)), probe(path)
    expected = turn(cornered())  # type: ignore[operator]
    assert shown.shape == expected.shape == (info.height, info.width, 3)
    assert np.abs(shown.astype(int) - expected).mean() < 4


@pytest.mark.parametrize(
    ("size", "aspect", "shown"),
    [
        ((480, 720), Fraction(32, 27), (480, 854)),  # NTSC DVDs: 853.3
        ((480, 720), Fraction(8, 9), (480, 640)),
        ((576, 720), Fraction(64, 45), (576, 1024)),
        ((48, 64), Fraction(1, 200), (48, 64)),  # no pixel is so thin: not believed
        ((47, 63), Fraction(1), (47, 63)),  # the file's own oddness stays
    ],
)
def test_sizes_of_our_making_are_even(
    tmp_path: Path, size: tuple[int, int], aspect: Fraction, shown: tuple[int, int]
) -> None:
    frames = np.full((2, *size, 3), 100, np.uint8)
    path = write_raw(tmp_path / "a.mkv", frames, pixel_format="yuv444p", pixel_aspect=aspect)
    info = probe(path)
    assert (info.height, info.width) == shown
    assert next(read_frames(path)).shape == (*shown, 3)


def of_two_fields(pictures: Sequence[np.ndarray], first: int = 0) -> Iterator[av.VideoFrame]:
    """Interlaced frames, upper field first, 25 a second from the number `first`."""
    graph = av.filter.Graph()
    height, width = pictures[0].shape[:2]
    nodes = (
        graph.add_buffer(
            width=width, height=height, format=av.VideoFormat("yuv420p"), time_base=Fraction(1, 25)
        ),
        graph.add("setfield", "tff"),
        graph.add("buffersink"),
    )
    graph.link_nodes(*nodes).configure()
    for n, picture in enumerate(pictures, first):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = n, Fraction(1, 25)
        graph.push(frame)
        yield graph.pull()


def test_interlaced_frames_are_made_whole(tmp_path: Path) -> None:
    """A bar that moves: its two fields are 16 pixels apart, which shows as a comb."""

    def bar(x: int) -> np.ndarray:
        frame = np.full((64, 128, 3), 40, np.uint8)
        frame[:, x : x + 24] = 220
        return frame

    frames = []
    for n in range(6):
        frame = bar(16 * n)
        frame[1::2] = bar(16 * n + 8)[1::2]
        frames.append(frame)
    path = tmp_path / "a.ts"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg2video", rate=25, options={"flags": "+ilme+ildct"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.bit_rate = 8_000_000
        for frame in of_two_fields(frames):
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))

    def comb(picture: np.ndarray) -> float:
        grey = picture[..., 1].astype(float)
        return float(np.abs(grey[1:-1] - (grey[:-2] + grey[2:]) / 2).mean())

    assert "interlaced: made whole, one frame for two fields" in differences(path)
    shown = list(read_timed(path))
    assert [float(time) for time, _ in shown] == pytest.approx([n / 25 for n in range(6)])
    assert comb(frames[2]) > 15
    for _, frame in shown[1:-1]:
        assert comb(frame) < comb(frames[2]) / 4


def test_no_frame_is_lost_where_interlaced_ones_become_others() -> None:
    """A broadcast changes its size with the programme; what is whole is made so with the old one's
    neighbours, and the last waits for one that does not come."""
    wide, small = np.zeros((4, 64, 128, 3), np.uint8), np.zeros((3, 32, 64, 3), np.uint8)
    given = [*of_two_fields(wide), *of_two_fields(small, 4), *of_two_fields(wide, 7)]
    shown = [
        (frame.pts * frame.time_base * 25, frame.width, frame.interlaced_frame)
        for frame in _whole(iter(given))
    ]
    assert shown == [(n, 64 if 4 <= n < 7 else 128, False) for n in range(11)]


def test_frames_that_are_whole_are_not_touched(make_video: MakeVideo) -> None:
    assert not any("interlaced" in line for line in differences(make_video()))


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv"])
def test_a_variable_rate_keeps_its_times(tmp_path: Path, name: str) -> None:
    """A screen recording: a burst at 60 a second, nothing for 12 s, another burst."""
    burst = [Fraction(n, 60) for n in range(60)]
    times = burst + [Fraction(12) + t for t in burst]
    frames = np.zeros((120, 48, 64, 3), np.uint8)
    frames[:, :, :] = (np.arange(120) % 20 * 12 + 4)[:, None, None, None]
    source = write_raw(tmp_path / "in.mkv", frames, times=times)
    info = probe(source)
    assert info.variable
    assert float(info.fps) == pytest.approx(120 / 13, rel=0.01)  # the mean
    assert float(info.bulk_fps or 0) == pytest.approx(60, rel=0.05)
    with VideoWriter(
        tmp_path / name, 64, 48, info.bulk_fps, audio_from=source, tick=info.tick
    ) as writer:
        for time, frame in read_timed(source):
            writer.write(frame[None], [time])
    again = list(read_timed(tmp_path / name))
    assert [number_of(frame) for _, frame in again] == [n % 20 for n in range(120)]
    assert [float(t) for t, _ in again] == pytest.approx([float(t) for t in times], abs=2e-3)
    assert probe(tmp_path / name).duration == pytest.approx(13, abs=0.1)


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv"])
def test_the_last_frame_is_shown_as_long_as_it_was(tmp_path: Path, name: str) -> None:
    """Of a slide show the last picture too: nothing comes after it to tell its length."""
    path = tmp_path / "in.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for n, picture in enumerate(numbered(3)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = n, Fraction(1)
            for packet in stream.encode(frame):
                packet.duration = round(3 / packet.time_base) if n == 2 else packet.duration
                output.mux(packet)
    info = probe(path)
    assert info.duration == pytest.approx(5)
    with VideoWriter(tmp_path / name, 64, 48, 1, audio_from=path, tick=info.tick) as writer:
        for time, frame in read_timed(path):
            writer.write(frame[None], [time])
    assert probe(tmp_path / name).duration == pytest.approx(5, abs=0.01)
    assert len(list(read_frames(tmp_path / name, fps=2))) == 10


def test_a_rate_that_was_asked_for_is_said(make_video: MakeVideo) -> None:
    path = make_video()
    assert differences(path, fps=16) == []
    assert differences(path, fps=8) == ["the rate becomes 8 frames a second; it is constant 16"]
    shown = list(read_timed(path, fps=8))
    assert [number_of(frame) for _, frame in shown] == list(range(0, 16, 2))
    assert [float(time) for time, _ in shown] == [n / 8 for n in range(8)]
    twice = [(float(time), number_of(frame)) for time, frame in read_timed(path, fps=32)]
    assert twice == [(n / 32, n // 2) for n in range(32)]


@pytest.mark.parametrize(
    ("pixels", "aspect", "about", "wanted"),
    [
        ("yuv420p", Fraction(1), {},
         FrameLook(64, 48, 0, Fraction(1), False, None, None, False, False)),
        ("yuva420p", Fraction(3, 2), {"colorspace": 9, "color_trc": 16, "color_primaries": 9},
         FrameLook(96, 48, 0, Fraction(3, 2), True, ("pq", "bt2020"), 9, True, False)),
        ("yuv444p", Fraction(1), {"colorspace": 5, "color_primaries": 12},
         FrameLook(64, 48, 0, Fraction(1), False, ("sdr", "p3"), 5, False, False)),
    ],
)  # fmt: skip
def test_all_that_is_known_of_a_frame_before_it_is_read(
    pixels: str, aspect: Fraction, about: dict[str, int], wanted: FrameLook
) -> None:
    frame = av.VideoFrame(64, 48, pixels)
    for name, value in about.items():
        setattr(frame, name, value)
    assert look(frame, aspect) == wanted
