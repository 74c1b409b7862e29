"""Encoded images <-> uint8 RGB [height, width, 3], safe against what a stranger may send.

The header is read and the size checked before a pixel is decoded, only the session's format is
accepted, and a frame costs at most what its size says.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

from serve.wire.protocol import Format, WireError

JPEG_QUALITY = 90
WEBP_QUALITY = 85


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(image), formats=[format])
        if picture.size != (width, height):
            raise WireError(
                "bad_frame",
                f"the session was opened for frames of {width}x{height}, "
                f"got {picture.width}x{picture.height}",
            )
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        return np.asarray(picture)
    except WireError:
        raise
    except Exception as error:  # Pillow raises many types for images that are broken
        raise WireError("bad_frame", f"not a readable {format} image: {error}") from error


def encode(pixels: np.ndarray, format: Format) -> bytes:
    """Encode uint8 [height, width, 3]."""
    if format == "rgb24":
        return pixels.tobytes()
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if format == "jpeg":
        # Full-resolution chroma: edits are about colour, and 4:2:0 would blur their edges.
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    elif format == "png":
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "WEBP", quality=WEBP_QUALITY, method=0)
    return buffer.getvalue()
