"""data/video, tracks and sound: what goes along with the picture, and what is said of it."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from data.video import VideoWriter, differences, probe, read_timed
from data.video.source.tracks import add_sound
from tests.data.conftest import MakeVideo, numbered, write_raw
from tests.data.video.test_clock import edited, restamped

RATE = 48000


def tone(layout: str, seconds: float = 1.0, rate: int = RATE) -> av.AudioFrame:
    """Channel n holds a tone of 200 (n + 1) Hz."""
    channels = av.AudioLayout(layout).nb_channels
    time = np.arange(int(rate * seconds)) / rate
    waves = np.stack([np.sin(time * 2 * np.pi * 200 * (n + 1)) for n in range(channels)])
    interleaved = (waves.T * 8000).astype(np.int16).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return frame


def with_tracks(
    path: Path,
    sounds: list[tuple[str, str, dict[str, str], bool]],
    *,
    rate: int = RATE,
    subtitle: str | None = None,
) -> Path:
    """A second of `numbered` and tracks of sound: (codec, layout, metadata, default)."""
    with av.open(str(path), "w") as output:
        picture = output.add_stream("libx264", rate=16, options={"crf": "4"})
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        added = []
        for codec, layout, about, default in sounds:
            stream = output.add_stream(codec, rate=rate)
            stream.layout = layout
            stream.metadata.update(about)
            stream.disposition = av.stream.Disposition.default if default else 0
            added.append((stream, layout))
        text = output.add_mux_stream(subtitle) if subtitle else None
        if text is not None:
            text.metadata["language"] = "deu"
        for n, image in enumerate(numbered(16)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts = n
            output.mux(picture.encode(frame))
        output.mux(picture.encode(None))
        for stream, layout in added:
            output.mux(stream.encode(tone(layout, rate=rate)))
            output.mux(stream.encode(None))
        if text is not None:
            words = "Grüße".encode()
            styled = b"\0\0\0\x0cstyl\0\0\0\0"  # what follows the words: none of their styles
            packet = av.Packet(
                len(words).to_bytes(2, "big") + words + styled if subtitle == "mov_text" else words
            )
            packet.stream, packet.time_base = text, Fraction(1, 1000)
            packet.pts = packet.dts = 250
            packet.duration = 500
            output.mux(packet)
    return path


def sounds(path: Path) -> list[tuple[str, str, str | None, bool]]:
    with av.open(str(path)) as container:
        return [
            (
                s.codec_context.name,
                s.layout.name,
                s.metadata.get("language"),
                bool(s.disposition & av.stream.Disposition.default),
            )
            for s in container.streams.audio
        ]


def pitches(path: Path) -> list[int]:
    """The loudest frequency of each channel of the first sound, in steps of 10 Hz."""
    with av.open(str(path)) as container:
        frames = []
        for frame in container.decode(audio=0):
            wave = frame.to_ndarray().astype(float)
            channels = frame.layout.nb_channels
            frames.append(wave if len(wave) == channels else wave.reshape(-1, channels).T)
            rate = frame.sample_rate
    wave = np.concatenate(frames, axis=1)[:, rate // 4 : rate // 4 + rate // 2]
    peaks = np.abs(np.fft.rfft(wave * np.hanning(wave.shape[1]), axis=1)).argmax(axis=1)
    return [round(2 * peak, -1) for peak in peaks.tolist()]


@pytest.mark.parametrize(
    ("source", "target", "codec", "layout", "kept"),
    [
        ("in.mov", "out.mov", "pcm_s16le", "stereo", True),
        ("in.mov", "out.mov", "pcm_s24le", "5.1", True),
        ("in.mkv", "out.mkv", "pcm_s16le", "stereo", True),
        ("in.mkv", "out.mkv", "mp2", "stereo", True),
        ("in.mkv", "out.mp4", "opus", "stereo", True),
        ("in.mov", "out.mp4", "pcm_s16le", "stereo", False),
        ("in.mov", "out.mp4", "pcm_s16le", "5.1", False),
        ("in.mkv", "out.mp4", "pcm_s24le", "5.1", False),
        ("in.mkv", "out.mov", "opus", "stereo", False),
    ],
)
def test_sound_is_copied_where_it_can_be_and_keeps_its_channels(
    tmp_path: Path, source: str, target: str, codec: str, layout: str, kept: bool
) -> None:
    path = with_tracks(tmp_path / source, [(codec, layout, {}, True)])
    said = differences(path, tmp_path / target)
    out = edited(path, tmp_path / target)
    channels = av.AudioLayout(layout).nb_channels
    # A bass channel passes only what is low: its own 800 Hz is not to be expected of an encoder.
    bass = {3} if layout == "5.1" and not kept else set()
    found = pitches(out)
    assert len(found) == channels
    assert all(found[n] == 200 * (n + 1) for n in range(channels) if n not in bass)
    with av.open(str(out)) as container:
        name = container.streams.audio[0].codec_context.codec.canonical_name
    assert name == (codec if kept else "aac")
    assert said == ([] if kept else [line for line in said if f"{codec} {layout}) becomes" in line])


def test_a_rate_that_aac_does_not_know_is_converted(tmp_path: Path) -> None:
    path = with_tracks(tmp_path / "in.mkv", [("pcm_s16le", "stereo", {}, True)], rate=192_000)
    out = edited(path, tmp_path / "out.mp4")
    assert pitches(out) == [200, 400]
    with av.open(str(out)) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.rate) == ("aac", 96_000)


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv"])
def test_languages_titles_and_the_default_track_stay(tmp_path: Path, name: str) -> None:
    tracks = [
        ("aac", "stereo", {"language": "eng", "title": "Original"}, False),
        ("aac", "mono", {"language": "fra"}, True),
    ]
    path = with_tracks(tmp_path / "in.mkv", tracks)
    out = edited(path, tmp_path / name)
    assert sounds(out) == [("aac", "stereo", "eng", False), ("aac", "mono", "fra", True)]


@pytest.mark.parametrize(
    ("source", "kind", "target"),
    [
        ("in.mp4", "mov_text", "out.mp4"),
        ("in.mp4", "mov_text", "out.mkv"),
        ("in.mkv", "subrip", "out.mp4"),
        ("in.mkv", "subrip", "out.mkv"),
    ],
)
def test_subtitles_go_along(tmp_path: Path, source: str, kind: str, target: str) -> None:
    path = with_tracks(tmp_path / source, [], subtitle=kind)
    assert differences(path, tmp_path / target) == []
    out = edited(path, tmp_path / target)
    with av.open(str(out)) as container:
        stream = container.streams.subtitles[0]
        assert stream.metadata["language"] == "deu"
        packets = [p for p in container.demux(stream) if p.size > 2]
        heard = [(float(p.pts * p.time_base), bytes(p)) for p in packets]
    ((time, text),) = heard
    assert time == pytest.approx(0.25, abs=0.002)
    if target == "out.mkv":
        assert text == "Grüße".encode(), "and nothing of MP4's styles"
    assert "Grüße".encode() in text


def test_what_cannot_go_along_is_named_in_one_line(tmp_path: Path) -> None:
    path = with_tracks(tmp_path / "in.mkv", [("aac", "mono", {}, True)], subtitle="ass")
    with av.open(str(path)) as container:
        container.streams.subtitles[0]
    assert differences(path, tmp_path / "out.mkv") == []
    (line,) = differences(path, tmp_path / "out.mp4")
    assert line == "left out: subtitles (ass deu)"
    edited(path, tmp_path / "out.mp4")


def test_a_track_of_an_unknown_kind_is_left_out(tmp_path: Path) -> None:
    """As phones write spatial sound beside AAC: the file is not refused for it."""
    tracks = [("aac", "stereo", {}, True), ("alac", "stereo", {}, False)]
    path = with_tracks(tmp_path / "in.mov", tracks)
    data = path.read_bytes()
    place = data.index(b"alac", data.index(b"stsd", data.index(b"mp4a")))
    path.write_bytes(data[:place] + b"qwrt" + data[place + 4 :])
    assert [line for line in differences(path, tmp_path / "o.mov") if line.startswith("left out")]
    out = edited(path, tmp_path / "out.mov")
    assert sounds(out) == [("aac", "stereo", "und", True)] or len(sounds(out)) == 1


def test_chapters_titles_and_time_code_go_along(make_video: MakeVideo, tmp_path: Path) -> None:
    source = tmp_path / "in.mov"
    with VideoWriter(source, 64, 48, 16) as writer:
        writer._output.metadata["title"] = "Holiday"
        writer._stream.metadata["timecode"] = "01:00:00:00"
        writer._output.set_chapters(
            [
                {"id": n, "start": 500 * n, "end": 500 * n + 500, "time_base": Fraction(1, 1000),
                 "metadata": {"title": f"part {n}"}}
                for n in range(2)
            ]
        )  # fmt: skip
        writer.write(numbered(16))
    assert differences(source, tmp_path / "out.mov") == []
    out = edited(source, tmp_path / "out.mov")
    with av.open(str(out)) as container:
        assert container.metadata["title"] == "Holiday"
        chapters = [
            (float(c["start"] * c["time_base"]), c["metadata"]["title"])
            for c in container.chapters()
        ]
        codes = {s.metadata.get("timecode") for s in container.streams}
    assert chapters == [(0.0, "part 0"), (0.5, "part 1")]
    assert "01:00:00:00" in codes


def test_chapters_begin_with_the_picture(make_video: MakeVideo, tmp_path: Path) -> None:
    """In a file whose clock starts at three seconds; what ended before has no length."""
    late = restamped(make_video(), tmp_path / "late.mkv", lambda time: time + 3)
    source = tmp_path / "in.mkv"
    with av.open(str(late)) as given, av.open(str(source), "w") as output:
        stream = output.add_stream_from_template(given.streams.video[0])
        output.set_chapters(
            [
                {"id": n, "start": start, "end": end, "time_base": Fraction(1, 1000),
                 "metadata": {"title": f"part {n}"}}
                for n, (start, end) in enumerate([(2000, 2500), (2500, 3500), (3500, 4000)])
            ]
        )  # fmt: skip
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    assert probe(source).duration == pytest.approx(1.0, abs=0.07)
    with av.open(str(edited(source, tmp_path / "out.mkv"))) as container:
        chapters = [
            (float(c["start"] * c["time_base"]), float(c["end"] * c["time_base"]))
            for c in container.chapters()
        ]
    assert chapters[-2:] == [(0.0, 0.5), (0.5, 1.0)]
    assert chapters[:-2] in ([], [(0.0, 0.0)])


def test_a_gap_in_converted_sound_stays(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "a.mkv", numbered(16), fps=8, audio="mp2", beeps=(0.25, 1.75))
    path = tmp_path / "gap.mkv"
    with av.open(str(source)) as given, av.open(str(path), "w") as output:
        streams = {s.index: output.add_stream_from_template(s) for s in given.streams}
        for packet in given.demux():
            time = float(packet.pts * packet.time_base) if packet.size else 9
            if time < 9 and not (packet.stream.type == "audio" and 0.6 < time < 1.4):
                packet.stream = streams[packet.stream.index]
                output.mux(packet)
    from tests.data.video.test_clock import beeps

    assert beeps(edited(path, tmp_path / "out.mp4")) == pytest.approx([0.25, 1.75], abs=0.05)


def test_metadata_that_is_not_text_does_not_stop_the_reading(make_video: MakeVideo) -> None:
    path = make_video("a.avi", codec="mpeg4")
    data = path.read_bytes()
    entry = b"INAM" + struct.pack("<I", 4) + b"caf\xe9"
    listed = b"LIST" + struct.pack("<I", 4 + len(entry)) + b"INFO" + entry
    place = data.index(b"LIST", data.index(b"strf"))
    size = struct.unpack("<I", data[4:8])[0] + len(listed)
    path.write_bytes(data[:4] + struct.pack("<I", size) + data[8:place] + listed + data[place:])
    assert probe(path).frames == 16
    assert len(list(read_timed(path))) == 16


@pytest.mark.parametrize(("channels", "rate"), [(1, 22_050), (2, 48_000), (6, 192_000)])
def test_sound_that_is_converted_has_bits_for_each_of_its_channels(
    channels: int, rate: int
) -> None:
    added = SimpleNamespace()
    asked: list[Any] = []
    output = SimpleNamespace(add_stream=lambda codec, rate: asked.append((codec, rate)) or added)
    layout = SimpleNamespace(name=f"{channels} channels")
    stream = SimpleNamespace(rate=rate, channels=channels, layout=layout)
    assert add_sound(output, "aac", stream) is added
    assert asked == [("aac", min(rate, 96_000))]
    assert added.bit_rate == 96_000 * channels
    assert added.layout == {1: "mono", 2: "stereo", 6: "5.1"}[channels]
