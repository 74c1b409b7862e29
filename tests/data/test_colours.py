"""Colours on their way in and out of files, each way alone: two faults cannot cancel out."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from data.sample import Pair, from_files, to_files
from data.video import VideoWriter, read_frames

COLOURS = ((200, 40, 90), (30, 160, 60), (60, 70, 210), (235, 235, 235), (12, 12, 12))
SIDE = 16
MATRIX = {"bt601": (0.299, 0.114, 5), "bt709": (0.2126, 0.0722, 1)}  # Kr, Kb, ffmpeg's number


def stripes(count: int) -> np.ndarray:
    """A stripe of each colour; the first three go down, so that no turn leaves them in place."""
    picture = np.concatenate([np.full((SIDE, SIDE, 3), c, np.uint8) for c in COLOURS], axis=1)
    picture = np.concatenate([picture, np.roll(picture, SIDE, axis=1)])
    return np.stack([np.roll(picture, n * SIDE, axis=1) for n in range(count)])


def middles(frames: np.ndarray) -> np.ndarray:
    return frames[:, SIDE // 2 :: SIDE, SIDE // 2 :: SIDE].astype(int)


def as_yuv(rgb: np.ndarray, matrix: str, full: bool) -> np.ndarray:
    """The standard's own formula: [..., 3] R'G'B' of 8 bits to Y'CbCr of 8 bits."""
    kr, kb, _ = MATRIX[matrix]
    red, green, blue = np.moveaxis(rgb / 255, -1, 0)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    high, wide, low = (255, 255, 0) if full else (219, 224, 16)
    return np.stack([low + high * luma, 128 + wide * cb, 128 + wide * cr], -1)


def write_planes(path: Path, frames: np.ndarray, matrix: str, full: bool) -> None:
    """YUV 4:4:4 by the formula, stored without loss and tagged; nothing of ours takes part."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace = MATRIX[matrix][2]
        stream.codec_context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        for n, picture in enumerate(frames):
            planes = np.moveaxis(as_yuv(picture, matrix, full), -1, 0).round().astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv444p")
            frame.pts, frame.time_base = n, Fraction(1, 16)
            frame.colorspace = MATRIX[matrix][2]
            frame.color_range = ColorRange.JPEG if full else ColorRange.MPEG
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", MATRIX)
def test_a_file_is_read_by_its_own_matrix_and_range(
    tmp_path: Path, matrix: str, full: bool
) -> None:
    write_planes(tmp_path / "in.mp4", stripes(3), matrix, full)
    found = np.stack(list(read_frames(tmp_path / "in.mp4")))
    assert np.abs(middles(found) - middles(stripes(3))).max() <= 2


@pytest.mark.parametrize(("codec", "pixel_format"), [("libx264rgb", "rgb24"), ("ffv1", "bgr0")])
def test_rgb_is_read_as_it_is_stored(tmp_path: Path, codec: str, pixel_format: str) -> None:
    with av.open(str(tmp_path / "in.mkv"), "w") as out:
        stream = out.add_stream(codec, rate=16, options={"crf": "0"} if "264" in codec else {})
        stream.height, stream.width = stripes(1).shape[1:3]
        stream.pix_fmt = pixel_format
        for n, picture in enumerate(stripes(3)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=pixel_format
            )
            frame.pts, frame.time_base = n, Fraction(1, 16)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    np.testing.assert_array_equal(np.stack(list(read_frames(tmp_path / "in.mkv"))), stripes(3))


@pytest.mark.parametrize("pixel_format", [None, "yuv444p"])
def test_what_is_written_is_bt709_of_limited_range_and_says_so(
    tmp_path: Path, pixel_format: str | None
) -> None:
    path = tmp_path / "out.mp4"
    height, width = stripes(1).shape[1:3]
    with VideoWriter(path, width, height, 16, crf=0, pixel_format=pixel_format) as writer:
        writer.write(stripes(3))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert [int(tag) for tag in tags] == [1, 1, 1]
        assert context.color_range == ColorRange.MPEG
        frames = list(container.decode(video=0))
    wanted = middles(as_yuv(stripes(3), "bt709", False).round())
    for frame, colours in zip(frames, wanted, strict=True):
        for number, plane in enumerate(frame.planes):
            values = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
            step = SIDE * plane.width // width
            found = values[step // 2 :: step, step // 2 : plane.width : step].astype(int)
            assert np.abs(found - colours[..., number]).max() <= 1, number


def test_a_pair_keeps_apart_what_it_holds() -> None:
    source, target = stripes(4), 255 - stripes(4)
    mask = np.zeros(source.shape[:3], bool)
    mask[:2, :SIDE, SIDE:] = True
    pair = Pair(source, target, mask, "invert it", 12.5, {"seed": 3})
    back = from_files(to_files(pair))
    assert isinstance(back, Pair)
    assert np.abs(middles(back.source) - middles(source)).max() <= 2
    assert np.abs(middles(back.target) - middles(target)).max() <= 2
    np.testing.assert_array_equal(back.mask, mask)
    assert (back.instruction, back.fps, back.origin) == ("invert it", 12.5, {"seed": 3})
    assert back.video_shape == (4, 2 * SIDE, 5 * SIDE)
    for name in ("source", "target", "mask"):  # each is a video of the same time
        with av.open(io.BytesIO(to_files(pair)[f"{name}.mp4"])) as container:
            stream = container.streams.video[0]
            assert (stream.average_rate, stream.frames) == (Fraction(25, 2), 4)
            assert name == "mask" or stream.pix_fmt == "yuv444p"
