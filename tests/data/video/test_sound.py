"""data/video/sound.py: the sound of the source, in its place, packet by packet where it can be."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.video import Damage, VideoWriter, probe, read_frames, read_timed
from tests.data.conftest import MakeVideo, number_of, numbered
from tests.data.video.test_clock import restamped


def audio_packets(path: Path) -> list[tuple[int, bytes]]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return [(p.pts, bytes(p)) for p in container.demux(stream) if p.pts is not None]


@pytest.mark.parametrize(
    ("name", "audio"), [("in.mp4", "aac"), ("in.mkv", "flac"), ("in.mp4", "mp3")]
)
def test_audio_packets_are_copied(
    make_video: MakeVideo, tmp_path: Path, name: str, audio: str
) -> None:
    source = make_video(name, audio=audio)
    out = tmp_path / f"out{Path(name).suffix}"
    with VideoWriter(out, 64, 48, 16, audio_from=source) as writer:
        for frame in read_frames(source):
            writer.write(frame[None])
    before, after = audio_packets(source), audio_packets(out)
    assert [data for _, data in after] == [data for _, data in before]
    assert [p for p, _ in after] == [p for p, _ in before]
    assert probe(out).has_audio


def test_audio_that_mp4_players_do_not_know_becomes_aac(
    make_video: MakeVideo, tmp_path: Path
) -> None:
    source = make_video("in.mkv", audio="pcm_s16le")
    out = tmp_path / "out.mp4"
    with VideoWriter(out, 64, 48, 16, audio_from=source) as writer:
        writer.write(numbered(16))
    with av.open(str(out)) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == "aac"
        samples = np.concatenate([f.to_ndarray()[0] for f in container.decode(stream)])
    assert len(samples) / 48000 == pytest.approx(1.0, abs=0.03)
    spectrum = np.abs(np.fft.rfft(samples[2048:34816]))
    assert np.argmax(spectrum) * 48000 / 32768 == pytest.approx(440, abs=3)


@pytest.mark.parametrize(("late", "shown"), [(0.06, 0.0), (0.1, 0.0), (0.2, 0.25)])
def test_sound_that_begins_a_little_early_moves_no_frame(
    make_video: MakeVideo, late: float, shown: float
) -> None:
    """As much as an encoder's padding is; more is heard before there is a picture, for whole
    frames."""
    times = [Fraction(n, 16) + Fraction(late) for n in range(16)]
    source = make_video("in.mkv", audio="flac", audio_seconds=1.5, times=times)
    assert [float(time) for time, _ in read_timed(source)] == [shown + n / 16 for n in range(16)]
    # At a rate that was asked for the picture begins at once: nobody hears it.
    assert [number_of(frame) for frame in read_frames(source, fps=16)] == list(range(16))


def test_audio_ends_with_a_shorter_video(make_video: MakeVideo, tmp_path: Path) -> None:
    source = make_video(audio="aac")
    out = tmp_path / "out.mp4"
    with VideoWriter(out, 64, 48, 16, audio_from=source) as writer:
        writer.write(numbered(8))
    last = max(pts for pts, _ in audio_packets(out)) / 48000
    assert 0.4 < last <= 0.5


def test_audio_is_heard_on_where_the_picture_is_damaged(
    make_video: MakeVideo, tmp_path: Path
) -> None:
    """Nobody cut the video short: its last frames could not be read."""
    source = make_video(audio="aac")
    out = tmp_path / "out.mp4"
    with VideoWriter(out, 64, 48, 16, audio_from=source, damage=Damage(missing=8)) as writer:
        writer.write(numbered(8))
    assert audio_packets(out) == audio_packets(source)


def test_audio_longer_than_the_video_is_kept(make_video: MakeVideo, tmp_path: Path) -> None:
    source = make_video(audio="aac", audio_seconds=1.5)
    out = tmp_path / "out.mp4"
    with VideoWriter(out, 64, 48, 16, audio_from=source) as writer:
        writer.write(numbered(16))
    assert len(audio_packets(out)) == len(audio_packets(source))


@pytest.mark.parametrize("later", [0, 3])  # when the file's clock starts
def test_sound_keeps_its_offset_to_the_picture(
    make_video: MakeVideo, tmp_path: Path, later: int
) -> None:
    # A picture that starts half a second after the sound, as after a cut without re-encoding.
    times = [Fraction(8 + n, 16) for n in range(16)]
    cut = make_video("in.mkv", times=times, audio="flac", gop=1)
    source = restamped(cut, tmp_path / "later.mkv", lambda time: time + later)
    out = tmp_path / "out.mkv"
    with VideoWriter(out, 64, 48, 16, audio_from=source) as writer:
        writer.write(numbered(16))

    def offset(path: Path) -> float:
        with av.open(str(path)) as container:
            first = {}
            for packet in container.demux():
                if packet.pts is not None:
                    first.setdefault(packet.stream.type, float(packet.pts * packet.time_base))
        return first["video"] - first["audio"]

    assert offset(source) == pytest.approx(0.5, abs=0.01)
    assert offset(out) == pytest.approx(offset(source), abs=0.01)
