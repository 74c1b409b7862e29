"""data/video, clocks: picture and sound by one clock, whatever stamps say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.video import VideoWriter, differences, probe, read_frames, read_timed
from data.video.source.clock import Segment, make_clock
from tests.data.conftest import number_of, numbered, write_raw

FPS, COUNT = 8, 16  # two seconds; a frame is 125 ms
Stamp = Callable[[float], float]


def beeping(path: Path, *, audio: str = "mp2", **options: object) -> Path:
    """`numbered` frames at 8 a second, and a tone that is heard during frames 4 and 12 only."""
    return write_raw(path, numbered(COUNT), fps=FPS, audio=audio, beeps=(0.5, 1.5), **options)  # type: ignore[arg-type]


def restamped(source: Path, target: Path, stamp: Stamp) -> Path:
    """Copies all packets, each moved to what `stamp` makes of its time in seconds."""
    with av.open(str(source)) as given, av.open(str(target), "w") as output:
        streams = {s.index: output.add_stream_from_template(s) for s in given.streams}
        for packet in given.demux():
            if packet.size == 0:
                continue
            base = packet.time_base
            shift = round(stamp(float(packet.pts * base)) / base) - packet.pts
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            packet.stream = streams[packet.stream.index]
            output.mux(packet)
    return target


def lying(path: Path, stamps: dict[int, int]) -> Path:
    """An IVF of `numbered` frames, whose frames of the numbers given have other stamps.

    An IVF is a header of 32 bytes, then size (4), stamp (8) and data of each frame.
    """
    write_raw(path, numbered(COUNT), fps=FPS, codec="libvpx", pixel_format="yuv420p")
    data, place = bytearray(path.read_bytes()), 32
    for number in range(COUNT):
        size = int.from_bytes(data[place : place + 4], "little")
        stamp = int.from_bytes(data[place + 4 : place + 12], "little")
        assert stamp == number
        stamp = stamps.get(number, number)
        data[place + 4 : place + 12] = stamp.to_bytes(8, "little")
        place += 12 + size
    path.write_bytes(data)
    return path


def shown(path: Path) -> list[tuple[float, int]]:
    return [(float(time), number_of(frame)) for time, frame in read_timed(path)]


def _decoded(container: av.container.InputContainer) -> Iterator[av.AudioFrame]:
    for packet in container.demux(audio=0):
        with contextlib.suppress(av.error.InvalidDataError):  # as a player does
            yield from packet.decode()


def beeps(path: Path) -> list[float]:
    """When each tone starts, in seconds from the first frame."""
    with av.open(str(path)) as container:
        start = min(f.time for f in container.decode(video=0))
    with av.open(str(path)) as container:
        rate, samples = 0, []
        for frame in _decoded(container):
            rate = frame.sample_rate
            times = frame.time + np.arange(frame.samples) / rate - start
            wave = frame.to_ndarray().astype(float)
            loud = np.abs(wave.reshape(-1, frame.samples)).max(axis=0)
            scale = 1.0 if frame.format.name.startswith("flt") else 32768.0
            samples.append(np.stack([times, loud / scale]))
    time, loud = np.concatenate(samples, axis=1)
    heard = time[loud > 0.1]
    return [float(t) for n, t in enumerate(heard) if n == 0 or t - heard[n - 1] > 0.2]


def edited(source: Path, target: Path) -> Path:
    """The source through reader and writer, frame by frame."""
    info = probe(source)
    with VideoWriter(
        target, info.width, info.height, info.fps, audio_from=source, tick=info.tick
    ) as out:
        for time, frame in read_timed(source):
            out.write(frame[None], [time])
    return target


def even(numbers: Sequence[int]) -> list[tuple[float, int]]:
    return [(n / FPS, number) for n, number in enumerate(numbers)]


def test_a_stream_that_restarts_goes_on(tmp_path: Path) -> None:
    part = beeping(tmp_path / "part.ts", audio_seconds=2.04)  # a little longer than the picture
    path = tmp_path / "joined.ts"
    path.write_bytes(part.read_bytes() * 8)
    assert shown(path) == even([*range(COUNT)] * 8)
    assert probe(path).duration == pytest.approx(16, abs=0.2)
    assert differences(path)[0] == "time stamps start anew 7 times: the parts follow each other"
    # Of the sound of each part, too: what little overlaps must not add up.
    heard = beeps(edited(path, tmp_path / "out.mp4"))
    assert heard == pytest.approx([n + 0.5 for n in range(16)], abs=0.03)


@pytest.mark.parametrize("hole", [45.0, 3600.0, 30 * 24 * 3600.0])
@pytest.mark.parametrize("name", ["out.ts", "out.mkv", "out.mp4"])
def test_a_hole_in_picture_and_sound_is_closed(tmp_path: Path, name: str, hole: float) -> None:
    if hole > 26 * 3600 and name != "out.mkv":
        pytest.skip("a TS restarts after 26.5 hours, a frame of an MP4 lasts 3 days at most")
    source = beeping(tmp_path / "in.mp4", audio="mp3")
    path = restamped(source, tmp_path / name, lambda t: t if t < 1 else t + hole)
    assert shown(path) == even(range(COUNT))
    assert len(list(read_frames(path, fps=FPS))) == COUNT
    (said,) = [line for line in differences(path, tmp_path / "x.mkv") if "jump ahead" in line]
    assert f"once, by {hole:,.0f} s" in said
    assert beeps(edited(path, tmp_path / "edit.mkv")) == pytest.approx([0.5, 1.5], abs=0.1)


def test_a_still_with_sound_is_no_hole(tmp_path: Path) -> None:
    """A lecture: the slide stands for 40 s while somebody speaks."""
    times = [Fraction(n, 8) for n in range(8)] + [Fraction(320 + n, 8) for n in range(8)]
    path = write_raw(
        tmp_path / "a.mkv", numbered(COUNT), times=times, audio="flac", audio_seconds=41
    )
    assert [t for t, _ in shown(path)] == [float(t) for t in times]
    assert not any("jump" in line for line in differences(path))


def test_a_short_still_without_sound_keeps_its_time(tmp_path: Path) -> None:
    """A silent screen recording: nothing moves for 20 s."""
    times = [Fraction(n, 8) for n in range(8)] + [Fraction(160 + n, 8) for n in range(8)]
    path = write_raw(tmp_path / "a.mkv", numbered(COUNT), times=times)
    assert [t for t, _ in shown(path)] == [float(t) for t in times]


def test_one_stamp_that_lies_moves_one_frame(tmp_path: Path) -> None:
    found = shown(lying(tmp_path / "a.ivf", {7: 9_000_000}))
    assert [number for _, number in found] == list(range(COUNT))
    assert [time for time, _ in found] == pytest.approx([n / FPS for n in range(COUNT)], abs=0.13)


def test_frames_of_one_stamp_are_shown_one_after_the_other(tmp_path: Path) -> None:
    """At a varying rate, too, where a frame's time is its stamp's."""
    for name, stamps in (("a.ivf", {5: 4, 11: 10}), ("b.ivf", {5: 4, 11: 13, 12: 13, 13: 13})):
        found = shown(lying(tmp_path / name, stamps))
        assert [number for _, number in found] == list(range(COUNT))
        steps = np.diff([time for time, _ in found])
        assert steps.min() > 0, name


def test_the_sound_stays_where_one_stamp_of_the_picture_lies() -> None:
    picture = [Segment(0, 0, 1), Segment(0, 9e5, 9e5 + 0.1), Segment(1, 1.25, 5)]
    clock = make_clock((0, picture), {1: [Segment(0, 0.02, 5.1)]}, hole=30, step=0.1)
    assert [s.clock_start for s in clock.segments[0]] == pytest.approx([0, 1, 1.25])
    assert clock.segments[1][0].shift == 0


def test_stamps_in_the_order_of_decoding_lose_no_frame(tmp_path: Path) -> None:
    """Some writers give B-frames the time at which they are decoded."""
    source = write_raw(tmp_path / "in.mkv", numbered(COUNT), fps=FPS)
    path = tmp_path / "lie.mkv"
    with av.open(str(source)) as given, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(given.streams.video[0])
        reordered = 0
        for n, packet in enumerate(p for p in given.demux(video=0) if p.size):
            reordered += packet.pts != n * 125
            packet.pts = packet.dts = n * 125
            packet.stream = stream
            output.mux(packet)
    assert reordered > 4  # there are B-frames
    assert shown(path) == even(range(COUNT))
    assert [number_of(f) for f in read_frames(path, fps=FPS)] == list(range(COUNT))


def test_swapped_stamps_keep_the_order_of_the_picture(tmp_path: Path) -> None:
    path = lying(tmp_path / "a.ivf", {4: 5, 5: 4, 9: 11, 10: 9, 11: 10})
    assert shown(path) == even(range(COUNT))
    assert "time stamps are out of order: frames keep the order of the picture" in differences(path)
    assert [number_of(f) for f in read_frames(path, fps=FPS)] == list(range(COUNT))


def test_a_file_without_stamps_is_read_at_its_rate(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.h264", numbered(COUNT), fps=FPS)
    assert shown(path) == even(range(COUNT))
    assert [number_of(f) for f in read_frames(path, fps=FPS / 2)] == list(range(0, COUNT, 2))


def test_the_first_stamp_may_be_anything(tmp_path: Path) -> None:
    source = beeping(tmp_path / "in.mp4", audio="mp3")
    path = restamped(source, tmp_path / "late.ts", lambda t: t + 49_000)
    assert shown(path) == even(range(COUNT))
    assert differences(path, tmp_path / "x.mkv") == []


def test_few_frames_over_days_stay_few(tmp_path: Path) -> None:
    """100 frames an hour apart: a reader that fills the time makes millions of them."""
    path = write_raw(
        tmp_path / "a.mp4",
        np.zeros((100, 16, 16, 3), np.uint8),
        times=[Fraction(3600 * n) for n in range(100)],
    )
    assert path.stat().st_size < 20_000
    assert len(list(read_timed(path))) == 100
    assert sum(1 for _ in read_frames(path, fps=25)) < 5000
    assert probe(path).duration < 200
