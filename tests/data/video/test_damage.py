"""data/video/decode.py, sound.py: past damage, counted; --strict refuses."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from data.video import VideoError, VideoWriter, check_whole, differences, probe, read_timed
from data.video.decode import Damage
from tests.data.conftest import MakeVideo, number_of, numbered, write_raw
from tests.data.video.test_clock import beeping, beeps, edited


def spans(path: Path, kind: str) -> list[tuple[int, int]]:
    """Where the packets of the first stream of a kind lie in the file: (start, size)."""
    data, found, place = path.read_bytes(), [], 0
    with av.open(str(path)) as container:
        for packet in container.demux(getattr(container.streams, kind)[0]):
            if packet.size:
                place = data.index(bytes(packet), place)
                found.append((place, packet.size))
    return found


def broken(path: Path, kind: str, numbers: list[int]) -> Path:
    """The file with the data of some packets overwritten."""
    data, places = bytearray(path.read_bytes()), spans(path, kind)
    for number in numbers:
        start, size = places[number]
        data[start : start + size] = b"\xff" * size
    path.write_bytes(data)
    return path


def test_a_picture_that_cannot_be_decoded_is_counted_and_left_out(make_video: MakeVideo) -> None:
    path = broken(make_video("a.mkv", codec="mjpeg", pixel_format="yuvj420p"), "video", [3, 9])
    damage = Damage()
    shown = [(float(t) * 16, number_of(f)) for t, f in read_timed(path, damage=damage)]
    assert shown == [(n, n) for n in range(16) if n not in (3, 9)]  # the rest keep their times
    assert damage.missing == 2
    assert str(damage).startswith("2 frames are lost")
    with pytest.raises(VideoError, match=r"a\.mkv: .*damaged"):
        list(read_timed(path, strict=True))


def test_a_file_that_is_cut_off_is_read_to_its_end_and_said(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    with VideoWriter(whole, 64, 48, 16) as writer:  # its index is at the front
        writer.write(noise)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    count = len(list(read_timed(cut)))
    assert 25 < count < 45
    said = differences(cut)
    assert said[0].startswith("the file is cut off: ")
    assert said[0].endswith(" of 60 frames are there")
    check_whole(whole)
    with pytest.raises(VideoError, match=r"cut\.mp4: is cut off: \d+ of 60 frames"):
        check_whole(cut)
    with pytest.raises(VideoError, match="is cut off"):
        next(read_timed(cut, strict=True))


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv"])
def test_a_bad_packet_of_sound_costs_that_packet(tmp_path: Path, name: str) -> None:
    """Copied or converted: the picture and the other sound are there."""
    source = broken(beeping(tmp_path / "in.mkv", audio="mp2"), "audio", [40])
    damage = Damage()
    info = probe(source)
    with VideoWriter(
        tmp_path / name, info.width, info.height, info.fps, audio_from=source, damage=damage
    ) as writer:
        for _, frame in read_timed(source):
            writer.write(frame[None])
    assert probe(tmp_path / name).frames == 16
    assert beeps(tmp_path / name) == pytest.approx([0.5, 1.5], abs=0.05)
    assert damage.sound == (1 if name == "out.mp4" else 0)


def without_start(source: Path, target: Path, frames: int) -> Path:
    """A cut without re-encoding that begins between two key frames."""
    with av.open(str(source)) as given, av.open(str(target), "w") as output:
        streams = {s.index: output.add_stream_from_template(s) for s in given.streams}
        video = given.streams.video[0]
        start = None
        for n, packet in enumerate(p for p in given.demux(video) if p.size):
            if n == frames:
                start = packet.dts * packet.time_base
        given.seek(0)
        for packet in given.demux():
            if packet.size and packet.dts * packet.time_base >= start:
                packet.stream = streams[packet.stream.index]
                output.mux(packet)
    return target


@pytest.mark.parametrize(("codec", "cut", "key"), [("libx264", 6, 11), ("mpeg2video", 1, 5)])
def test_a_start_between_key_frames_keeps_the_sound_in_its_place(
    tmp_path: Path, codec: str, cut: int, key: int
) -> None:
    source = beeping(tmp_path / "in.ts", codec=codec, gop=12)
    path = without_start(source, tmp_path / "cut.ts", cut)
    shown = [(float(t), number_of(f)) for t, f in read_timed(path)]
    assert [number for _, number in shown] == list(range(key, 16))
    assert any("starts in the middle" in line for line in differences(path))
    out = edited(path, tmp_path / "out.mp4")
    # Frame 12 is shown and the second tone is heard at the same time; `beeps` counts from `key`.
    assert beeps(out)[-1] == pytest.approx((12 - key) / 8, abs=0.06)
    # And the sound before the first picture is still there.
    with av.open(str(out)) as container:
        first = min(f.time for f in container.decode(video=0))
    assert first == pytest.approx(float(shown[0][0]), abs=0.03)
    assert first > 0.3


def test_a_long_way_to_the_first_key_frame_is_no_damage(tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 255, (130, 48, 64, 3), dtype=np.uint8)
    source = write_raw(tmp_path / "in.ts", frames, fps=25, gop=120)
    path = without_start(source, tmp_path / "cut.ts", 2)
    with av.open(str(path)) as container:
        keys = [p.is_keyframe for p in container.demux(video=0) if p.size]
    assert keys.index(True) > 100
    assert len(list(read_timed(path))) == len(keys) - keys.index(True)


def test_what_needs_a_key_frame_that_is_not_there_is_no_damage(tmp_path: Path) -> None:
    """A decoder refuses each of them; the file is said to start in the middle, and that is all."""
    path = write_raw(tmp_path / "a.ivf", numbered(16), fps=8, codec="libvpx", gop=6)
    data = path.read_bytes()  # a header of 32 bytes, then size (4), stamp (8) and data of frames
    first = 32 + 12 + int.from_bytes(data[32:36], "little")
    path.write_bytes(data[:32] + data[first:])
    damage = Damage()
    numbers = [number_of(frame) for _, frame in read_timed(path, damage=damage)]
    assert numbers == list(range(6, 16))
    assert not damage, damage
    assert list(read_timed(path, strict=True))


def test_pictures_that_nobody_sees_are_not_missed(tmp_path: Path) -> None:
    """VP8 stores references that are never shown, a packet each, as web videos have them."""
    path = write_raw(
        tmp_path / "a.ivf", numbered(16), codec="libvpx", pixel_format="yuv420p", gop=8
    )
    # An IVF is a header of 32 bytes, then size (4), stamp (8) and data of each frame.
    data = path.read_bytes()
    out, place, hidden = bytearray(data[:32]), 32, 0
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "little")
        frame = bytearray(data[place:end])
        if not frame[12] & 1:  # a key frame; the same again before it, not to be shown
            hidden += 1
            frame[12] &= ~0x10
            out += frame
        out += data[place:end]
        place = end
    path.write_bytes(out)
    assert hidden >= 2
    damage = Damage()
    shown = [number_of(frame) for _, frame in read_timed(path, damage=damage, strict=True)]
    assert shown == list(range(16))
    assert not damage
    assert probe(path).frames == 16


def test_nothing_that_can_be_decoded_is_named(make_video: MakeVideo) -> None:
    path = broken(
        make_video("a.mkv", codec="mjpeg", pixel_format="yuvj420p"), "video", list(range(16))
    )
    with pytest.raises(VideoError, match=r"a\.mkv: has a video stream but no frame"):
        list(read_timed(path))
