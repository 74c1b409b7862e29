"""What a video file is, found out before any of it is used: one pass over its packets.

Nothing is decoded but the frames up to the first that can be shown. Time stamps, counts and lengths
are those of the packets that are really there, not those that the file's header promises.
"""

from __future__ import annotations

import math
import os
from array import array
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np

from data.clock import FILE_HOLE_S, STREAM_HOLE_S, Clock, Segment, Segmenter, make_clock
from data.container import REMEDY, Source, open_video, packets, video_stream
from data.picture import Look, look, pixel_aspect
from data.rate import MAX_FPS, Rate, find_rate
from data.video_errors import VideoError, file_name, reason

MAX_FRAMES = 10_000_000  # of one file: four days at 25 a second, 80 MB of time stamps
CUT_SHORT = 0.02  # of the frames or seconds that the header promises
SOUND_BEFORE_S = 0.1  # sound ahead of the picture that is more than an encoder's own padding
REORDER = 16  # frames that a decoder holds back at most


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
    look: Look  # of the first frame
    has_audio: bool
    codec: str


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
        stated = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        step = next((1 / r for r in stated if r and 0 < r <= MAX_FPS), Fraction(1, 25))
        scan = _scan(container, stream, sounds, float(step), path)
        rate = find_rate(scan.times, stated, stream.time_base)
        if rate is None:
            raise VideoError(f"{file_name(path)}: states no frame rate; {REMEDY}")
        first = Fraction(0) if scan.first is None else scan.first
        length = max(_fraction(scan.length), 1 / rate.fps)
        if scan.first is None:
            end = first + scan.count / rate.fps
        else:
            end = max(_fraction(scan.times[-1]), first) + length
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
            cut_off=_cut_off(container, stream, scan, float(end - first)),
            look=look(scan.frame, pixel_aspect(stream)),
            has_audio=bool(sounds),
            codec=stream.codec_context.name,
        )


def _lead(sound: Fraction | None, first: Fraction, rate: Rate) -> Fraction:
    """How long before the first frame the sound starts, in whole frames so that a grid stays."""
    if sound is None or first - sound <= SOUND_BEFORE_S:
        return Fraction(0)
    return math.ceil((first - sound) * rate.fps) / rate.fps


def _cut_off(container: Any, stream: Any, scan: _Scan, shown_s: float) -> str | None:
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


@dataclass
class _Scan:
    clock: Clock
    times: np.ndarray  # seconds on the clock, sorted; empty when the file has no stamps
    length: float  # of the frame shown last; 0 when its packet does not say
    count: int
    trimmed: int  # packets that an edit list takes out
    reorder: int
    disordered: bool
    sound_start: Fraction | None
    frame: av.VideoFrame
    first: Fraction | None  # its time on the clock
    undecodable: int


def _scan(container: Any, stream: Any, sounds: list[Any], step: float, path: Source) -> _Scan:
    hole = STREAM_HOLE_S if container.format.name in ("mpegts", "mpeg") else FILE_HOLE_S
    segmenters = {s.index: Segmenter(s.time_base, hole) for s in sounds}
    picture = segmenters[stream.index] = Segmenter(stream.time_base, hole, step)
    start = _Start()
    stamps, numbers = array("q"), array("l")  # of each frame: its stamp, its segment
    count = trimmed = latest = last_length = 0
    ordered = True
    for packet in packets(container, [stream, *sounds]):
        ours = packet.stream.index == stream.index
        number = segmenters[packet.stream.index].feed(packet)
        if ours and start.frame is None:
            start.decode(packet, number)
        if not ours or packet.size == 0:
            continue
        if packet.is_discard:
            trimmed += 1
            continue
        count += 1
        if count > MAX_FRAMES:
            raise VideoError(f"{file_name(path)}: has more than {MAX_FRAMES} frames; cut it first")
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None:
            continue
        same = bool(numbers) and numbers[-1] == number
        ordered = ordered and not (same and stamp < stamps[-1])
        if not same or stamp >= latest:
            latest, last_length = stamp, packet.duration or 0
        stamps.append(stamp)
        numbers.append(number)
    if start.frame is None:
        raise VideoError(
            f"{file_name(path)}: has a video stream but no frame ({start.why}); {REMEDY}"
        )
    clock = make_clock(
        (stream.index, picture.segments),
        {s.index: segmenters[s.index].segments for s in sounds if segmenters[s.index].segments},
        hole=hole,
        step=step,
    )
    times = np.frombuffer(stamps, np.int64).astype(np.float64) * float(stream.time_base)
    if len(picture.segments) > 1:
        times += np.array([s.shift for s in picture.segments])[np.frombuffer(numbers, np.int_)]
    # Frames that are reordered have stamps that are not in the file's order, others have.
    reordered = bool(stream.codec_context.has_b_frames)
    lies = ordered == reordered and len(times) > 1
    # What lies before time 0 (an encoder's padding, what an edit list cuts off) is not heard.
    starts = [
        max(0.0, s.segments[0].clock_start)
        for s in segmenters.values()
        if s is not picture and s.segments
    ]
    return _Scan(
        clock=clock,
        times=np.sort(times),
        length=min(last_length * float(stream.time_base), hole),
        count=count,
        trimmed=trimmed,
        reorder=REORDER if lies else 0,
        disordered=not ordered and not reordered,
        sound_start=Fraction(min(starts)).limit_denominator(10**7) if starts else None,
        frame=start.frame,
        first=start.time(stream.time_base, picture.segments),
        undecodable=start.lost,
    )


class _Start:
    """The first frame that can be shown, and what could not be before it."""

    def __init__(self) -> None:
        self.frame: av.VideoFrame | None = None
        self.why = "its video stream holds nothing"
        self.lost = 0
        self._segments: dict[int, int] = {}  # of what went into the decoder, by its stamp

    def decode(self, packet: Any, segment: int) -> None:
        if packet.pts is not None and not packet.is_discard:
            self._segments[packet.pts] = segment
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError) as error:
            self.why = reason(error)
            return
        if frames:
            self.frame = frames[0]
            pts = self.frame.pts
            self.lost = 0 if pts is None else sum(stamp < pts for stamp in self._segments)

    def time(self, time_base: Fraction, segments: list[Segment]) -> Fraction | None:
        assert self.frame is not None
        if self.frame.pts is None or not segments:
            return None
        shift = segments[self._segments.get(self.frame.pts, 0)].shift
        return (self.frame.pts + round(shift / float(time_base))) * time_base


def _tick(time_base: Fraction) -> Fraction:
    """What times are kept to in a file whose rate varies: the source's own where it can be."""
    exact = time_base.numerator == 1 and 1000 <= time_base.denominator <= 1_000_000
    return time_base if exact else Fraction(1, 90_000)
