"""Frames on the wire: binary messages <-> encoded images <-> uint8 RGB [height, width, 3].

A message, either way, is 16 bytes little-endian (uint32 frame index from 0, uint32 flags = 0,
uint64 capture time in microseconds) and the image.

What a stranger sends does no harm: an image's size is checked before a pixel is decoded, only the
session's format is accepted, and what an image may cost is bounded: a progressive JPEG may go over
its pixels thousands of times in a few bytes each, so the number of its scans is, and so is the CPU
time that is spent.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
from PIL import Image, ImageOps

from serve.wire.protocol import Format, WireError

HEADER = struct.Struct("<IIQ")
MAX_INDEX = 2**32 - 1
JPEG_QUALITY = 90
WEBP_QUALITY = 85
MAX_SCANS = 20  # of a JPEG; a usual progressive one has 10, with 4 components 18
MAX_DECODE_S = 1.0  # CPU seconds of one image; 1280x720 takes 0.02 to 0.1
SCAN = b"\xff\xda"  # starts every scan, so that their number bounds the scans for any parser
_files = threading.local()  # of threads that encode

ORIENTATION = 0x0112  # EXIF tag; from 5 on width and height change places


@dataclass(frozen=True)
class Frame:
    """A binary message; `image` is encoded as the session's format says."""

    index: int
    time_us: int
    image: bytes

    def to_bytes(self) -> bytes:
        return HEADER.pack(self.index, 0, self.time_us) + self.image


def parse_frame(data: bytes) -> Frame:
    """A binary message. Raises WireError `bad_frame`."""
    if len(data) <= HEADER.size:
        raise WireError(
            "bad_frame",
            f"a binary message needs {HEADER.size} bytes of header and an image, "
            f"got {len(data)} bytes",
        )
    index, flags, time_us = HEADER.unpack_from(data)
    if flags:
        raise WireError("bad_frame", f"flags of frame {index} must be 0, got {flags}")
    return Frame(index, time_us, data[HEADER.size :])


def decode(image: bytes, format: Format, *, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]. Raises WireError `bad_frame`."""
    if format == "rgb24":
        wanted = width * height * 3
        if len(image) != wanted:
            raise WireError(
                "bad_frame",
                f"an rgb24 frame of {width}x{height} has {wanted} bytes, got {len(image)}",
            )
        return np.frombuffer(image, np.uint8).reshape(height, width, 3)
    if format == "jpeg" and (scans := image.count(SCAN)) > MAX_SCANS:
        raise WireError("bad_frame", f"a JPEG of {scans} scans; at most {MAX_SCANS}")
    began = time.thread_time()
    try:
        pixels = _decode(image, format, width, height)
    except WireError:
        raise
    except Exception as error:  # Pillow raises many types for images that are broken
        kind = type(error).__name__  # its text holds addresses of this process
        raise WireError("bad_frame", f"not a readable {format} image ({kind})") from error
    if (spent := time.thread_time() - began) > MAX_DECODE_S:
        raise WireError(
            "bad_frame", f"decoding one image took {spent:.1f} s of CPU; at most {MAX_DECODE_S:g} s"
        )
    return pixels


def _decode(image: bytes, format: Format, width: int, height: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture: Image.Image = Image.open(io.BytesIO(image), formats=[format])
    turn = picture.getexif().get(ORIENTATION, 1) if format == "jpeg" else 1
    size = picture.size[::-1] if turn >= 5 else picture.size
    if size != (width, height):
        raise WireError(
            "bad_frame",
            f"the session was opened for frames of {width}x{height}, got {size[0]}x{size[1]}",
        )
    if turn != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
        grey = np.rint(np.asarray(picture) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def encode(pixels: np.ndarray, format: Format) -> bytes:
    """Encode uint8 [height, width, 3]."""
    if format == "rgb24":
        return pixels.tobytes()
    picture = Image.fromarray(pixels)
    if format == "jpeg":
        return _encode_jpeg(picture)
    buffer = io.BytesIO()
    if format == "png":
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "WEBP", quality=WEBP_QUALITY, method=0)
    return buffer.getvalue()


def _encode_jpeg(picture: Image.Image) -> bytes:
    """Beside other threads: into a file Pillow writes without the interpreter's lock, into memory
    with it."""
    file = _memory_file()
    file.seek(0)
    # Full-resolution chroma: edits are about colour, and 4:2:0 would blur their edges.
    picture.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    size = file.tell()
    file.seek(0)
    return file.read(size)


def _memory_file() -> BinaryIO:
    """This thread's: a new one for every image takes as long as half the image."""
    kept: _MemoryFile | None = getattr(_files, "kept", None)
    if kept is None and sys.platform == "linux":
        # Where no descriptor is left, an image is made more slowly and no session ends.
        with contextlib.suppress(OSError):
            kept = _files.kept = _MemoryFile(os.memfd_create("image"), "r+")
    return cast(BinaryIO, kept or io.BytesIO())  # no other platform has files in memory


class _MemoryFile(io.FileIO):
    def __del__(self) -> None:  # with its thread
        self.close()
