"""A decoded frame as a player shows it: RGB, upright, square pixels, SDR BT.709, opaque."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import Interpolation, VideoReformatter

from data.video.errors import VideoError
from data.video.source.colour import is_tagged, mapping, to_screen, usual_matrix
from data.video.source.container import MAX_PIXELS

# Chroma at full resolution and exact rounding cost 10 to 20 % of the conversion and keep coloured
# edges where they are.
EXACT = Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
MAX_ASPECT = 16  # of a pixel, either way: beyond it the file lies


class Turn:
    """One of the eight ways to hold a picture, from a display matrix (ISO 14496-12, 8.3.2)."""

    def __init__(self, frame: av.VideoFrame) -> None:
        sides: Any = frame.side_data
        data = sides.get(Type.DISPLAYMATRIX)
        a, b, _, c, d = struct.unpack("5i", bytes(data)[:20]) if data else (1, 0, 0, 0, 1)
        self.across = abs(b) + abs(c) > abs(a) + abs(d)  # rows become columns
        self.mirrored = (c if self.across else a) < 0  # left and right change places, after that
        self.upside_down = (b if self.across else d) < 0

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Turns `[height, width, ...]`."""
        if self.across:
            picture = picture.swapaxes(0, 1)
        rows, columns = slice(None, None, -1 if self.upside_down else 1), slice(None)
        if self.mirrored:
            columns = slice(None, None, -1)
        return picture[rows, columns]


def pixel_aspect(stream: Any) -> Fraction:
    aspect = stream.sample_aspect_ratio
    sane = aspect and 1 / MAX_ASPECT <= aspect <= MAX_ASPECT
    return Fraction(aspect) if sane else Fraction(1)


def shown_size(frame: av.VideoFrame, aspect: Fraction) -> tuple[int, int]:
    """(width, height) in square pixels; even where the width is of our own making."""
    width = frame.width if aspect == 1 else max(2, 2 * round(frame.width * aspect / 2))
    return (frame.height, width) if Turn(frame).across else (width, frame.height)


def has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


@dataclass(frozen=True)
class FrameLook:
    """What is to be known of a video's frames before they are read."""

    width: int  # as shown
    height: int
    rotation: int  # degrees counter-clockwise
    aspect: Fraction  # of a stored pixel
    resized: bool  # as square pixels it is of another size
    tones: tuple[str, str] | None  # (transfer, primaries) that are mapped to SDR BT.709
    matrix: int | None  # of H.273; None: the colours do not say
    transparent: bool
    interlaced: bool


def look(frame: av.VideoFrame, aspect: Fraction) -> FrameLook:
    width, height = shown_size(frame, aspect)
    return FrameLook(
        width=width,
        height=height,
        rotation=frame.rotation,
        aspect=aspect,
        resized=(width, height) != shown_size(frame, Fraction(1)),
        tones=mapping(frame),
        matrix=frame.colorspace if is_tagged(frame) else None,
        transparent=has_alpha(frame),
        interlaced=frame.interlaced_frame,
    )


class Scaler:
    """Decoded frame to RGB of one size; keeps FFmpeg's contexts between frames.

    Args:
        size: `(height, width)`; the picture covers it and is cut around its centre. None: as shown.
        aspect: Of a stored pixel.
        untagged: The matrix (H.273) of colours that do not say theirs. None: by the frame's size.
        page: What shows through transparent places, 0 black (as players) or 255 white.
    """

    def __init__(
        self,
        size: tuple[int, int] | None,
        aspect: Fraction,
        *,
        untagged: int | None = None,
        page: int = 0,
    ) -> None:
        if size is not None and min(size) < 1:
            raise ValueError(f"size must be (height, width) of at least one pixel, got {size}")
        self.size, self.aspect, self.untagged, self.page = size, aspect, untagged, page
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 `[height, width, 3]`."""
        shown_w, shown_h = shown_size(frame, self.aspect)
        if self.size is None:  # a file may change its size on the way: the first frame decides
            self.size = (shown_h, shown_w)
        out_h, out_w = self.size
        ratio = max(Fraction(out_w, shown_w), Fraction(out_h, shown_h))
        cover_w, cover_h = max(out_w, round(shown_w * ratio)), max(out_h, round(shown_h * ratio))
        if cover_w * cover_h > MAX_PIXELS:
            raise VideoError(
                f"frames of {shown_w}x{shown_h} cannot be cut to {out_w}x{out_h}: to cover that "
                f"they would have to be {cover_w}x{cover_h}"
            )
        turn = Turn(frame)
        picture = self._convert(
            frame, (cover_h, cover_w) if turn.across else (cover_w, cover_h), ratio < 1
        )
        picture = turn(picture)
        top, left = (cover_h - out_h) // 2, (cover_w - out_w) // 2
        return np.ascontiguousarray(picture[top : top + out_h, left : left + out_w])

    def _convert(self, frame: av.VideoFrame, size: tuple[int, int], shrinks: bool) -> np.ndarray:
        if not is_tagged(frame):
            frame.colorspace = self.untagged or usual_matrix(frame.width, frame.height)
        tones, alpha = mapping(frame), has_alpha(frame)
        picture = self._reformatter.reformat(
            frame,
            width=size[0],
            height=size[1],
            format="rgb48le" if tones else "rgba" if alpha else "rgb24",
            interpolation=(Interpolation.AREA if shrinks else Interpolation.BICUBIC) | EXACT,
            dst_color_range="JPEG",
            threads=1,
        )
        pixels = picture.to_ndarray()
        if tones:
            return to_screen(pixels, *tones)
        if pixels.shape[2] == 4:
            share = pixels[..., 3:].astype(np.uint16)
            blended = (pixels[..., :3] * share + self.page * (255 - share) + 127) // 255
            pixels = blended.astype(np.uint8)
        return pixels
