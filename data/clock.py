"""One clock for picture and sound, whatever the time stamps of a file say.

A stream's packets are cut into segments where its stamps jump: back, or ahead by more than a hole
may last. Each segment gets a shift that puts it where it belongs: where its stamps say if that
follows what came before, else right after it. Sound takes the shifts of the picture it came with,
so that both stay together.

All times here are seconds as the file states them, or on the clock (`raw + shift`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

# What ffmpeg takes for a jump in a transport stream, whose clock may restart at any time.
STREAM_HOLE_S = 10.0
# Files whose stamps are their own hold stills: a silent screen recording shows one for long.
FILE_HOLE_S = 30.0
BACK_S = 1.0  # further back than frames are reordered
NEAR = 8  # segments of the picture that a segment of sound may belong to
MAX_SEGMENTS = 200  # more than these, and the stamps say nothing


@dataclass
class Segment:
    """Packets of one stream whose stamps follow each other."""

    start: float  # the smallest stamp
    end: float  # the end of what is stamped last
    shift: float = 0.0

    @property
    def clock_start(self) -> float:
        return self.start + self.shift

    @property
    def clock_end(self) -> float:
        return self.end + self.shift


class Segmenter:
    """Follows one stream's packets in the file's order and says which segment each is of."""

    def __init__(self, time_base: Fraction, hole: float, step: float = 0.0) -> None:
        """`step` is how long a packet lasts that does not say so, in seconds."""
        self.time_base, self.hole, self.step = float(time_base), hole, step
        self.segments: list[Segment] = []
        self._last: float | None = None  # the furthest decoding time of the segment

    def feed(self, packet: Any) -> int:
        """The number of the packet's segment."""
        stamp = packet.pts if packet.dts is None else packet.dts
        if stamp is None:
            return max(0, len(self.segments) - 1)
        time = stamp * self.time_base
        shown = time if packet.pts is None else packet.pts * self.time_base
        length = min((packet.duration or 0) * self.time_base or self.step, self.hole)
        last = self._last
        if last is None or time < last - BACK_S or time > last + self.hole:
            self.segments.append(Segment(shown, shown + length))
            self._last = time
        else:
            segment = self.segments[-1]
            segment.start = min(segment.start, shown)
            segment.end = max(segment.end, shown + length)
            self._last = max(last, time)
        return len(self.segments) - 1


@dataclass(frozen=True)
class Repairs:
    """What was wrong with the stamps."""

    back: int = 0  # times they started anew
    ahead: int = 0  # holes that were closed
    closed_s: float = 0.0  # seconds of holes taken out

    def __bool__(self) -> bool:
        return bool(self.back or self.ahead)


@dataclass
class Clock:
    """The shifts of all segments of the picture and of each stream of sound, by stream index."""

    hole: float
    shifts: dict[int, list[float]] = field(default_factory=dict)
    repairs: Repairs = Repairs()

    def reader(self, stream: Any) -> Repairer:
        """For one pass over the packets of `stream`."""
        return Repairer(stream.time_base, self.hole, self.shifts.get(stream.index, []))


class Repairer:
    """Puts packets of one stream on the clock, in the file's order."""

    def __init__(self, time_base: Fraction, hole: float, shifts: Sequence[float]) -> None:
        self._segmenter = Segmenter(time_base, hole)
        self._shifts = [round(shift / float(time_base)) for shift in shifts]

    def repair(self, packet: Any) -> None:
        number = self._segmenter.feed(packet)
        shift = self._shifts[number] if number < len(self._shifts) else 0
        if shift:
            packet.pts = None if packet.pts is None else packet.pts + shift
            packet.dts = None if packet.dts is None else packet.dts + shift


def make_clock(
    picture: tuple[int, list[Segment]],
    sounds: dict[int, list[Segment]],
    *,
    hole: float,
    step: float,
) -> Clock:
    """Finds all shifts; `picture` and `sounds` are segments by stream index, `step` is a frame."""
    index, segments = picture
    streams = [segments, *sounds.values()]
    if _jump_together(streams, hole):
        # As one: neither picture nor sound then starts before the other's last part has ended.
        whole = [
            Segment(min(s.start for s in parts), max(s.end for s in parts))
            for parts in zip(*streams, strict=True)
        ]
        leads = [p.start - w.start for p, w in zip(segments, whole, strict=True)]
        repairs = _place(whole, [], hole, step, leads)
        for stream in streams:
            for part, segment in zip(stream, whole, strict=True):
                part.shift = segment.shift
    else:
        leads = [0.0] * len(segments)
        repairs = _place(segments, list(sounds.values()), hole, step, leads)
        for stream in sounds.values():
            _place_beside(stream, segments, hole)
    shifts = {index: [segment.shift for segment in segments]}
    shifts |= {number: [s.shift for s in stream] for number, stream in sounds.items()}
    return Clock(hole, shifts, repairs)


def _jump_together(streams: list[list[Segment]], hole: float) -> bool:
    if len({len(stream) for stream in streams}) != 1:
        return False
    starts = ([s.start for s in parts] for parts in zip(*streams, strict=True))
    return all(max(times) - min(times) <= hole for times in starts)


def _place(
    segments: list[Segment],
    sounds: list[list[Segment]],
    hole: float,
    step: float,
    leads: list[float],
) -> Repairs:
    """Gives each segment its shift.

    `sounds` tell a still from a hole; `leads` is how long after a segment its picture starts.
    """
    back = ahead = 0
    closed = 0.0
    known = [0.0]  # the last shifts, newest first
    end = segments[0].clock_end if segments else 0.0
    sane = len(segments) <= MAX_SEGMENTS
    origin = segments[0].start + leads[0] if segments else 0.0
    for number, (before, segment) in enumerate(pairwise(segments), 1):
        for shift in known if sane else ():
            gap = segment.start + shift - end
            still = shift == before.shift and _sounds_on(before.end, segment.start, sounds, hole)
            if gap >= -BACK_S and (gap <= hole or still):
                segment.shift = shift
                break
        else:
            # By whole frames: the picture goes on at its rate.
            frames = math.ceil((end + leads[number] - origin) / step - 1e-3)
            segment.shift = origin + frames * step - leads[number] - segment.start
            gap = segment.start - before.end
            back, ahead = back + (gap < 0), ahead + (gap >= 0)
            closed += max(0.0, gap)
            known = [segment.shift, *known[:3]]
        end = max(end, segment.clock_end)
    return Repairs(back, ahead, closed)


def _sounds_on(start: float, end: float, sounds: list[list[Segment]], hole: float) -> bool:
    """Whether a sound goes on from `start` to `end`, so that the picture only stands still."""
    return any(
        part.start <= start + hole and part.end >= end - hole and part.start < end
        for stream in sounds
        for part in stream[:MAX_SEGMENTS]
    )


def _place_beside(sound: list[Segment], picture: list[Segment], hole: float) -> None:
    """Gives each segment of a sound the shift of the picture whose stamps are about the same."""
    end: float | None = None
    first = 0  # of the picture's segments that may still be met
    for segment in sound:
        chosen = None
        for number, beside in enumerate(picture[first : first + NEAR], first):
            near = beside.start - hole <= segment.end and segment.start <= beside.end + hole
            if near and (end is None or segment.start + beside.shift >= end - BACK_S):
                chosen = number
                break
        if chosen is not None:
            segment.shift, first = picture[chosen].shift, chosen
        elif end is not None:
            segment.shift = end - segment.start
        elif picture:
            segment.shift = picture[0].start + picture[0].shift - segment.start
        end = segment.clock_end
