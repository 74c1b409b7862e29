from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from serve.wire.codec import MAX_INDEX, Frame, decode, encode, parse_frame
from serve.wire.protocol import Format, WireError
from tests.serve.conftest import clip

FORMATS: tuple[Format, ...] = ("jpeg", "png", "webp", "rgb24")


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format: Format) -> None:
    frame = clip(1, width=50, height=34)[0]
    back = decode(encode(frame, format), format, width=50, height=34)
    assert back.dtype == np.uint8
    assert back.shape == frame.shape
    if format in ("png", "rgb24"):
        np.testing.assert_array_equal(back, frame)
    else:
        assert np.abs(back.astype(int) - frame).mean() < 4


@pytest.mark.parametrize("index", [0, 7, MAX_INDEX])
def test_every_index_that_a_session_may_reach_has_its_place_in_a_message(index: int) -> None:
    frame = Frame(index, 2**64 - 1, b"image")
    assert parse_frame(frame.to_bytes()) == frame


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_shown_as_its_camera_was_held(orientation: int) -> None:
    """Of the eight ways four turn it on its side; the size is that of what is shown."""
    picture = Image.fromarray(clip(1, width=48, height=32)[0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, exif=exif)
    stored = Image.open(io.BytesIO(buffer.getvalue()))
    shown = np.asarray(ImageOps.exif_transpose(stored))
    height, width = shown.shape[:2]
    assert (width < height) is (orientation >= 5)
    np.testing.assert_array_equal(
        decode(buffer.getvalue(), "jpeg", width=width, height=height), shown
    )
    with pytest.raises(WireError, match=f"got {width}x{height}"):
        decode(buffer.getvalue(), "jpeg", width=height, height=width)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_of_other_images_the_pixels_are_taken_as_they_lie(format: Format) -> None:
    """No camera turns them, whatever was copied into their EXIF."""
    picture = Image.fromarray(clip(1, width=48, height=32)[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, format, lossless=True, exif=exif)
    assert Image.open(io.BytesIO(buffer.getvalue())).getexif()[0x0112] == 6
    pixels = decode(buffer.getvalue(), format, width=48, height=32)
    np.testing.assert_array_equal(pixels, np.asarray(picture))


@pytest.mark.parametrize("format", FORMATS)
def test_another_size_is_refused_with_both_numbers(format: Format) -> None:
    image = encode(clip(1)[0], format)
    with pytest.raises(WireError, match=r"64x32") as raised:
        decode(image, format, width=64, height=32)
    assert raised.value.code == "bad_frame"


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_damage_is_a_bad_frame(format: Format) -> None:
    image = encode(clip(1)[0], format)
    random = np.random.default_rng(0)
    hostile = [image[: len(image) // 2], b"", b"\x00" * 100, b"GIF89a" + bytes(50)]
    for _ in range(200):
        broken = bytearray(image)
        for place in random.integers(0, len(broken), 4):
            broken[place] = random.integers(0, 256)
        hostile.append(bytes(broken))
    refused = 0
    for data in hostile:
        try:
            assert decode(data, format, width=48, height=32).shape == (32, 48, 3)
        except WireError as error:
            refused += error.code == "bad_frame"
    assert refused >= 4


def test_another_format_than_the_sessions_is_refused() -> None:
    with pytest.raises(WireError):
        decode(encode(clip(1)[0], "png"), "jpeg", width=48, height=32)


def test_a_bomb_is_refused_before_its_pixels_are_decoded() -> None:
    def piece(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", header)
    bomb += piece(b"IDAT", zlib.compress(bytes(1000))) + piece(b"IEND", b"")
    with pytest.raises(WireError) as raised:
        decode(bomb, "png", width=48, height=32)
    assert raised.value.code == "bad_frame"


def test_grey_and_transparent_images_become_rgb() -> None:
    for mode in ("L", "RGBA", "P"):
        buffer = io.BytesIO()
        Image.fromarray(clip(1)[0]).convert(mode).save(buffer, "PNG")
        assert decode(buffer.getvalue(), "png", width=48, height=32).shape == (32, 48, 3)


def test_sixteen_bits_of_grey_become_eight() -> None:
    """Pillow would cut all above 255 off."""
    levels = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), "png", width=4, height=1)
    np.testing.assert_array_equal(pixels, np.array([[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]))
