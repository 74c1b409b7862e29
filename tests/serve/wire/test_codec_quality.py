"""What a picture keeps on its way through the codec: colour, place, and how much of it."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from serve.wire.codec import _memory_file, decode, encode
from serve.wire.protocol import Format, WireError

# Measured: JPEG at quality 90 with full chroma has 46.0 dB here (41.3 at 80, 30.5 with 4:2:0).
# WebP always halves its chroma (30.4 dB), so its quality shows in grey (38.4 at 85, 37.0 at 80).
LOSSY: dict[Format, float] = {"jpeg": 45.0, "webp": 30.0}
WEBP_GREY = 38.0


def scene(height: int = 96, width: int = 128) -> np.ndarray:
    """uint8 [height, width, 3]: soft shades, coloured edges, and three corners that differ."""
    y, x = np.mgrid[0:height, 0:width]
    out = np.stack([x * 200 // width, y * 200 // height, (x + y) * 90 // (height + width)], axis=-1)
    out[20:50, 30:70] = (220, 30, 40)
    out[40:80, 60:100] = (30, 60, 210)
    out[:12, :12], out[:12, -12:], out[-12:, :12] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    return out.astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def through(format: Format, picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    return decode(encode(picture, format), format, width=width, height=height)


@pytest.mark.parametrize("format", ["png", "rgb24"])
def test_lossless_formats_are_lossless(format: Format) -> None:
    np.testing.assert_array_equal(through(format, scene()), scene())


@pytest.mark.parametrize("format", LOSSY)
def test_lossy_formats_are_good(format: Format) -> None:
    back = through(format, scene())
    assert psnr(back, scene()) >= LOSSY[format]
    assert len(encode(scene(), format)) < scene().size / 4


def test_webp_keeps_what_its_quality_says() -> None:
    noise = np.random.default_rng(0).normal(0, 4, (96, 128, 1))
    grey = (scene().mean(-1, keepdims=True) + noise).clip(0, 255).astype(np.uint8)
    picture = np.repeat(grey, 3, axis=-1)
    assert psnr(through("webp", picture), picture) >= WEBP_GREY


def test_lossless_images_are_made_quickly() -> None:
    """Their size is the sender's line; the time is every session's of a front."""
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "PNG", compress_level=1)
    assert encode(scene(), "png") == buffer.getvalue()


def test_a_thread_encodes_into_one_file() -> None:
    """A new one for every image takes as long as half the image."""
    with ThreadPoolExecutor(1) as other:
        here, there = _memory_file(), other.submit(_memory_file).result()
        assert here is _memory_file() is not there
        assert there is other.submit(_memory_file).result()
    fresh = io.BytesIO()
    Image.fromarray(scene(32, 48)).save(fresh, "JPEG", quality=90, subsampling=0)
    assert len(encode(scene(), "jpeg")) > len(fresh.getvalue())  # and nothing of that is left
    assert encode(scene(32, 48), "jpeg") == fresh.getvalue()


@pytest.mark.parametrize("format", LOSSY)
def test_colours_and_corners_stay_where_they_are(format: Format) -> None:
    back, right = through(format, scene()), scene()
    best = psnr(back, right)
    others = [right[..., order] for order in permutations(range(3)) if order != (0, 1, 2)]
    others += [right[::-1], right[:, ::-1], 255 - right, np.roll(right, 4, axis=1)]
    assert all(psnr(back, other) < best - 6 for other in others)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_show_the_same_picture(mode: str) -> None:
    picture = Image.fromarray(scene()).convert(mode)
    kind: Format = "jpeg" if mode == "CMYK" else "png"
    buffer = io.BytesIO()
    picture.save(buffer, kind.upper(), **({"quality": 95} if kind == "jpeg" else {}))
    back = decode(buffer.getvalue(), kind, width=128, height=96)
    assert psnr(back, np.asarray(picture.convert("RGB"))) > 38
    assert back.flags.c_contiguous


def test_raw_frames_are_rows_of_red_green_blue() -> None:
    data = bytes(range(2 * 3 * 3))
    picture = decode(data, "rgb24", width=3, height=2)
    assert picture.tolist() == [
        [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
        [[9, 10, 11], [12, 13, 14], [15, 16, 17]],
    ]
    assert encode(picture, "rgb24") == data
    assert encode(np.asfortranarray(picture), "rgb24") == data


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize(("width", "height"), [(127, 96), (128, 95), (96, 128)])
def test_the_size_is_that_of_the_session_to_the_pixel(
    format: Format, width: int, height: int
) -> None:
    with pytest.raises(WireError, match=f"{width}x{height}, got 128x96") as raised:
        decode(encode(scene(), format), format, width=width, height=height)
    assert raised.value.code == "bad_frame"


@pytest.mark.parametrize("sent", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("agreed", ["jpeg", "png", "webp"])
def test_only_the_sessions_format_is_read(sent: Format, agreed: Format) -> None:
    image = encode(scene(), sent)
    if sent == agreed:
        assert decode(image, agreed, width=128, height=96).shape == (96, 128, 3)
        return
    with pytest.raises(WireError, match=f"readable {agreed} image") as raised:
        decode(image, agreed, width=128, height=96)
    assert raised.value.code == "bad_frame"
