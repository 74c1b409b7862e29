"""data/video: any file in, the same picture, length and sound out."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.video import VideoError, VideoWriter, differences, probe, read_frames, read_timed
from tests.data.conftest import MakeVideo, number_of, numbered, write_raw


def numbers(path: Path, **options: object) -> list[int]:
    return [number_of(frame) for frame in read_frames(path, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkv", "ffv1", "yuv444p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mov", "mjpeg", "yuvj420p"),
    ],
)
def test_any_codec_and_container(
    make_video: MakeVideo, name: str, codec: str, pixel_format: str
) -> None:
    path = make_video(name, codec=codec, pixel_format=pixel_format)
    info = probe(path)
    assert (info.width, info.height, info.fps) == (64, 48, 16)
    assert info.duration == pytest.approx(1.0, abs=0.03)
    assert not info.has_audio
    assert numbers(path) == list(range(16))


def test_rotation_turns_picture_and_size(make_video: MakeVideo) -> None:
    # The red corner is stored upper left; a display rotation of 90 degrees counter-clockwise
    # shows it lower left, of 180 lower right, of -90 upper right.
    for degrees, (row, column) in {90: (-1, 0), 180: (-1, -1), -90: (0, -1)}.items():
        path = make_video(f"r{degrees}.mp4", rotation=degrees)
        info, frame = probe(path), next(read_frames(path))
        assert frame.shape == (info.height, info.width, 3)
        assert (info.width, info.height) == ((64, 48) if degrees == 180 else (48, 64))
        red = frame[row, column].astype(int)
        assert red[0] > 180, (degrees, red)
        assert red[1] < 80, (degrees, red)


def test_anamorphic_pixels_become_square(make_video: MakeVideo) -> None:
    path = make_video(pixel_aspect=Fraction(3, 2))
    assert (probe(path).width, probe(path).height) == (96, 48)
    assert next(read_frames(path)).shape == (48, 96, 3)
    assert differences(path)[0] == "pixels become square: 96x48"
    nearly = make_video("nearly.mp4", pixel_aspect=Fraction(512, 513))  # of 64, to whole pixels
    assert (probe(nearly).width, probe(nearly).height) == (64, 48)
    assert differences(nearly) == []


@pytest.mark.parametrize(("fps", "step"), [(8, 2), (4, 4)])
def test_resampling_down_drops_evenly(make_video: MakeVideo, fps: int, step: int) -> None:
    shown = numbers(make_video(), fps=fps)
    assert shown == list(range(0, 16, step))


def test_resampling_up_repeats(make_video: MakeVideo) -> None:
    assert numbers(make_video(), fps=32) == sorted([*range(16)] * 2)


def test_resampling_to_the_same_rate_ignores_rounded_stamps(make_video: MakeVideo) -> None:
    # Matroska rounds stamps to milliseconds; a rule "last frame at or before" would stutter.
    path = make_video("a.mkv", fps=Fraction(30000, 1001))
    assert probe(path).fps == Fraction(30000, 1001)
    assert numbers(path, fps=Fraction(30000, 1001)) == list(range(16))


def test_variable_rate_is_read_by_time_stamps(make_video: MakeVideo) -> None:
    # Frames 0 to 7 last 1/32 s each, 8 to 15 last 1/8 s each: 1.25 s in all.
    times = [Fraction(n, 32) for n in range(8)] + [
        Fraction(1, 4) + Fraction(n, 8) for n in range(8)
    ]
    path = make_video(times=times)
    shown = numbers(path, fps=16)
    assert abs(len(shown) - 20) <= 1  # the last frame's length is the encoder's to say
    assert shown[:18] == [0, 2, 4, 6, *sorted([*range(8, 15)] * 2)]


def test_cover_and_centre_crop_never_stretch(tmp_path: Path) -> None:
    frames = np.zeros((2, 96, 160, 3), np.uint8)
    y, x = np.mgrid[0:96, 0:160]
    frames[:, np.hypot(y - 47.5, x - 79.5) < 30] = 255
    path = write_raw(tmp_path / "disc.mp4", frames)
    for height, width in [(48, 48), (64, 33), (31, 90), (192, 320)]:
        picture = next(read_frames(path, size=(height, width)))
        assert picture.shape == (height, width, 3)
        scale = max(height / 96, width / 160)
        row, column = picture[height // 2, :, 0] > 127, picture[:, width // 2, 0] > 127
        assert row.sum() == pytest.approx(min(width, 60 * scale), abs=2)
        assert column.sum() == pytest.approx(min(height, 60 * scale), abs=2)
        ys, xs = np.nonzero(picture[..., 0] > 127)
        assert ys.mean() == pytest.approx((height - 1) / 2, abs=0.6)
        assert xs.mean() == pytest.approx((width - 1) / 2, abs=0.6)


def test_start_and_count_are_in_frames_of_the_result(make_video: MakeVideo) -> None:
    path = make_video()
    assert numbers(path, start=3, count=4) == [3, 4, 5, 6]
    assert numbers(path, start=14, count=9) == [14, 15]
    assert numbers(path, count=0) == []
    assert numbers(path, fps=32, start=3, count=4) == [1, 2, 2, 3]


def test_times_of_a_rate_are_exact_however_it_was_said(make_video: MakeVideo) -> None:
    """Of frames that are shown twice, too: a tick is a hundred parts of 2,997."""
    times = [time for time, _ in read_timed(make_video(), fps=29.97)]
    assert times == [n * Fraction(100, 2997) for n in range(30)]


def test_repeated_frames_do_not_share_memory(make_video: MakeVideo) -> None:
    path = make_video()
    timed = (frame for _, frame in read_timed(path, fps=32))
    for frames in (read_frames(path, fps=32), timed):
        first, second = next(frames), next(frames)
        first[:] = 0
        assert second.any()


@pytest.mark.parametrize(
    "colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (9, 9, 9)]
)
def test_colours_survive(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    frames = np.full((3, 32, 32, 3), colour, np.uint8)
    with VideoWriter(tmp_path / "c.mp4", 32, 32, 16) as writer:
        writer.write(frames)
    back = next(read_frames(tmp_path / "c.mp4"))
    assert np.abs(back.astype(int) - frames[0]).max() <= 3


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 64), (48, 63), (47, 63), (2, 2)])
@pytest.mark.parametrize("rate", [Fraction(16), Fraction(30000, 1001), Fraction(25, 2)])
def test_writer_keeps_size_rate_and_length(
    tmp_path: Path, height: int, width: int, rate: Fraction
) -> None:
    path = tmp_path / "o.mp4"
    frames = numbered(16, height, width)
    with VideoWriter(path, width, height, rate) as writer:
        writer.write(frames[:5])
        writer.write(frames[5:])
    info = probe(path)
    assert (info.width, info.height, info.fps, info.frames) == (width, height, rate, 16)
    assert info.duration == pytest.approx(float(16 / rate), abs=1e-3)
    assert numbers(path) == list(range(16))
    with av.open(str(path)) as container:
        pixel_format = container.streams.video[0].pix_fmt
    assert pixel_format == ("yuv444p" if height % 2 or width % 2 else "yuv420p")


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_writer_containers(tmp_path: Path, suffix: str) -> None:
    with VideoWriter(tmp_path / f"o{suffix}", 64, 48, 16) as writer:
        writer.write(numbered(4))
    assert numbers(tmp_path / f"o{suffix}") == [0, 1, 2, 3]


def test_lossless_gray_is_exact(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((6, 31, 45)) > 0.5
    buffer = io.BytesIO()
    with VideoWriter(buffer, 45, 31, 16, crf=0, pixel_format="gray", reproducible=True) as writer:
        writer.write(mask.astype(np.uint8) * 255)
    buffer.seek(0)
    back = np.stack(list(read_frames(buffer)))[..., 0] > 127
    np.testing.assert_array_equal(back, mask)


def test_fragmented_output_leaves_while_it_is_written(make_video: MakeVideo) -> None:
    class Pipe(io.RawIOBase):  # cannot seek, like a socket
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, block: bytes) -> int:  # type: ignore[override]
            self.data += block
            return len(block)

    pipe = Pipe()
    frames = numbered(16)
    sizes = []
    with VideoWriter(
        pipe, 64, 48, 4, fragmented=True, audio_from=make_video(fps=4, audio="aac")
    ) as writer:
        for frame in frames:
            writer.write(frame[None])
            sizes.append(len(pipe.data))
    assert sum(b > a for a, b in itertools.pairwise(sizes)) >= 2  # a piece a second
    data = io.BytesIO(bytes(pipe.data))
    assert [number_of(f) for f in read_frames(data)] == list(range(16))
    data.seek(0)
    assert probe(data).has_audio
    assert b"moof" in pipe.data


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "o.mp4"

    def edit() -> None:
        with VideoWriter(path, 64, 48, 16) as writer:
            writer.write(numbered(3))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        edit()
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "o.mp4"
    path.write_bytes(b"older")
    with pytest.raises(VideoError, match="no frame was written"), VideoWriter(path, 64, 48, 16):
        pass
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_same_path_can_be_read_and_replaced(make_video: MakeVideo) -> None:
    path = make_video(audio="aac")
    with VideoWriter(path, 64, 48, 16, audio_from=path) as writer:
        for frame in read_frames(path):
            writer.write(255 - frame[None])
    assert next(read_frames(path)).mean() > 200
    assert probe(path).has_audio


def test_full_disk_is_named(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with (
        full.open("wb", buffering=0) as device,
        pytest.raises(VideoError, match="disk is full"),
        VideoWriter(device, 64, 48, 16, fragmented=True) as writer,
    ):
        writer.write(numbered(16))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "not a readable video"),
        (b"this is text, not a video " * 40, "not a readable video"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    for read in (probe, lambda p: list(read_frames(p))):
        with pytest.raises(VideoError, match=words) as raised:
            read(path)
        assert str(path) in str(raised.value)


def test_a_cut_off_file_and_a_folder_are_named(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video()
    path.write_bytes(path.read_bytes()[:-2000])  # the index of an MP4 lies at its end
    with pytest.raises(VideoError, match=r"in\.mp4: not a readable video"):
        probe(path)
    with pytest.raises(VideoError, match="is no file; give a video file"):
        probe(tmp_path)


def test_sound_without_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=48000)
        stream.layout = "mono"
        block = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.int16), "s16", "mono")
        block.sample_rate = 48000
        output.mux(stream.encode(block))
        output.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        probe(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"file": "o.webm"}, "cannot hold H.264"),
        ({"file": "missing/o.mp4"}, "no folder"),
        ({"width": 1}, "at least 2x2"),
        ({"fps": 0}, "fps must be above 0"),
        ({"codec": "h266"}, "no codec 'h266'"),
        ({"audio_from": "gone.mp4"}, "its audio cannot be read"),
    ],
)
def test_impossible_outputs_are_refused(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    arguments = {"file": "o.mp4", "width": 64, "height": 48, "fps": 16, **options}
    arguments["file"] = tmp_path / str(arguments["file"])
    with pytest.raises(VideoError, match=words):
        VideoWriter(**arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_shape_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(VideoError, match=r"must be uint8 \[n, 48, 64, 3\], got float64"),
        VideoWriter(tmp_path / "o.mp4", 64, 48, 16) as writer,
    ):
        writer.write(np.zeros((1, 48, 64, 3)))
    assert list(tmp_path.iterdir()) == []


PASS_THROUGH = """
import resource, sys
from data.video import VideoWriter, probe, read_frames
path, out = sys.argv[1:]
info = probe(path)
with VideoWriter(out, info.width, info.height, info.fps, preset="ultrafast") as writer:
    for frame in read_frames(path, fps=info.fps):
        writer.write(frame[None])
print(writer.count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    used = {}
    for seconds in (2, 20):
        picture = np.zeros((1, 240, 320, 3), np.uint8)
        path = tmp_path / f"{seconds}.mp4"
        with VideoWriter(path, 320, 240, 25, preset="ultrafast") as writer:
            for n in range(25 * seconds):
                picture[:] = n % 200
                writer.write(picture)
        run = subprocess.run(
            [sys.executable, "-c", PASS_THROUGH, path, tmp_path / "out.mp4"],
            check=True,
            capture_output=True,
            text=True,
        )
        count, used[seconds] = map(int, run.stdout.split())
        assert count == 25 * seconds
    unit = 1024 if sys.platform != "darwin" else 1
    # 450 more frames are 104 MB as RGB; what may grow is the muxer's table of packets.
    assert (used[20] - used[2]) * unit < 25e6, used


def test_probe_says_how_many_frames_and_how_turned(make_video: MakeVideo) -> None:
    assert probe(make_video("a.mp4")).frames == 16
    assert probe(make_video("a.mkv")).frames == 16  # Matroska does not state it: counted
    for degrees in (0, 90, 180, -90):
        info = probe(make_video(f"r{degrees}.mp4", rotation=degrees))
        assert info.rotation % 360 == degrees % 360


def test_time_begins_with_the_first_frame(make_video: MakeVideo) -> None:
    path = make_video("late.mkv", times=[Fraction(8 + n, 16) for n in range(16)])
    assert numbers(path, fps=16) == list(range(16))
    assert numbers(path, fps=8, start=1, count=3) == [2, 4, 6]
