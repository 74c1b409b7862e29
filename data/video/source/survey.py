"""What a video file is, found out before any of it is used: one pass over its packets.

Nothing is decoded but the frames up to the first that can be shown. Time stamps, counts and lengths
are those of the packets that are really there, not those that the file's header promises.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np

from data.video.errors import VideoError, file_name
from data.video.source.clock import Clock
from data.video.source.container import REMEDY, Source, open_video, video_stream
from data.video.source.rate import MAX_FPS, Rate, find_rate
from data.video.source.scan import Scan, scan_packets
from data.video.source.upright import FrameLook, look, pixel_aspect

CUT_SHORT = 0.02  # of the frames or seconds that the header promises
SOUND_BEFORE_S = 0.1  # sound ahead of the picture that is more than an encoder's own padding


@dataclass(frozen=True)
class Survey:
    """All times are seconds on the clock of `clock`, which picture and sound share."""

    clock: Clock
    rate: Rate
    packets: int  # that hold a frame to be shown
    origin: Fraction  # the beginning of what is shown and heard: time 0 of everything given out
    first: Fraction  # of the first frame, after `origin` when sound comes before it
    end: Fraction  # of the last frame
    length: Fraction  # how long the last frame is shown
    longest: Fraction  # from one frame to the next
    tick: Fraction  # times are kept to this
    reorder: int  # frames among whose stamps the right one is to be looked for; 0: in order
    disordered: bool  # whether they are known to be wrong
    stamped: bool  # whether the file has any time stamps
    undecodable: int  # frames before the first that can be decoded
    cut_off: str | None  # how much is there of what the header promises, when it is less
    look: FrameLook  # of the first frame
    has_audio: bool
    codec: str

    @property
    def fps(self) -> Fraction:
        """The rate, or the mean where it varies."""
        if self.rate.constant or self.packets < 2:
            return self.rate.fps
        return (self.packets / (self.end - self.first)).limit_denominator(100_000)


def survey(path: Source) -> Survey:
    """Raises VideoError: no such file, not a video, or no frame can be decoded."""
    if isinstance(path, str | Path) and Path(path).is_file():
        state = os.stat(path)
        return _remembered(str(path), state.st_size, state.st_mtime_ns, state.st_ino)
    return _survey(path)


@lru_cache(maxsize=16)
def _remembered(path: str, size: int, changed: int, inode: int) -> Survey:
    del size, changed, inode  # part of the key: another file of that name is another file
    return _survey(path)


def _survey(path: Source) -> Survey:
    with open_video(path) as container:
        stream = video_stream(container, path)
        sounds = [s for s in container.streams.audio if s.codec_context is not None]
        stated: tuple[Fraction | None, ...]
        stated = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        step = next((1 / r for r in stated if r and 1 <= r <= MAX_FPS), Fraction(1, 25))
        scan = scan_packets(container, stream, sounds, float(step), path)
        if scan.first is None:  # the mean of nothing: what the stream itself says is better
            stated = (stream.guessed_rate, *stated)
        rate = find_rate(scan.times, stated, stream.time_base)
        if rate is None:
            raise VideoError(f"{file_name(path)}: states no frame rate; {REMEDY}")
        first = Fraction(0) if scan.first is None else scan.first
        length, cut_off = _fraction(scan.length) or 1 / rate.fps, None
        if scan.first is None:
            end = first + scan.count / rate.fps
        else:
            last = max(_fraction(scan.times[-1]), first)
            cut_off = _cut_off(container, stream, scan, float(last + length - first))
            if cut_off is None and not scan.clock.repairs:
                length = max(length, _stated_end(container, stream) - last)
            length = min(length, Fraction(scan.clock.hole))
            end = last + length
        return Survey(
            clock=scan.clock,
            rate=rate,
            packets=scan.count,
            origin=first - _lead(scan.sound_start, first, rate),
            first=first,
            end=end,
            length=length,
            longest=_fraction(np.diff(scan.times).max()) if len(scan.times) > 1 else length,
            tick=1 / rate.fps if rate.grid else _tick(stream.time_base),
            reorder=scan.reorder,
            disordered=scan.disordered,
            stamped=scan.first is not None,
            undecodable=scan.undecodable,
            cut_off=cut_off,
            look=look(scan.frame, pixel_aspect(stream)),
            has_audio=bool(sounds),
            codec=stream.codec_context.name,
        )


def _lead(sound: Fraction | None, first: Fraction, rate: Rate) -> Fraction:
    """How long before the first frame the sound starts, in whole frames so that a grid stays."""
    if sound is None or first - sound <= SOUND_BEFORE_S:
        return Fraction(0)
    return math.ceil((first - sound) * rate.fps) / rate.fps


def _stated_end(container: Any, stream: Any) -> Fraction:
    """When an MP4 or MOV says that its picture ends.

    A packet's length is there that of its place in the order of decoding, not of its frame.
    """
    if container.format.name.startswith("mov") and stream.duration:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    return Fraction(0)


def _cut_off(container: Any, stream: Any, scan: Scan, shown_s: float) -> str | None:
    if stream.frames:
        promised = stream.frames - scan.trimmed
        if promised - scan.count > max(2, CUT_SHORT * promised):
            return f"{scan.count} of {promised} frames are there"
        return None
    stated = float(stream.duration * stream.time_base) if stream.duration else 0.0
    stated = stated or (container.duration or 0) / av.time_base
    if not scan.clock.repairs and stated - shown_s > max(1.0, CUT_SHORT * stated):
        return f"{shown_s:.1f} of {stated:.1f} s are there"
    return None


def _fraction(seconds: float) -> Fraction:
    return Fraction(float(seconds)).limit_denominator(10**7)


def _tick(time_base: Fraction) -> Fraction:
    """What times are kept to in a file whose rate varies: the source's own where it can be."""
    exact = time_base.numerator == 1 and 1000 <= time_base.denominator <= 1_000_000
    return time_base if exact else Fraction(1, 90_000)
