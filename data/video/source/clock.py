"""One clock for picture and sound, whatever the time stamps of a file say.

A stream's packets are cut into runs where its stamps start anew, and runs into segments where
nothing is stamped for longer than a hole may last. Each segment gets a shift that puts it where it
belongs: where its stamps say if that follows what came before, else right after it. Sound takes the
shifts of the picture it came with, so that both stay together.

All times here are seconds as the file states them, or on the clock (`raw + shift`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

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

    run: int  # how often the stamps had started anew before
    start: float  # the smallest stamp
    end: float  # the end of what is stamped last
    shift: float = 0.0

    @property
    def clock_start(self) -> float:
        return self.start + self.shift

    @property
    def clock_end(self) -> float:
        return self.end + self.shift


class Runs:
    """Follows one stream's packets in the file's order and counts how often their time restarts."""

    def __init__(self, time_base: Fraction) -> None:
        self.time_base = float(time_base)
        self.number = 0
        self._last: float | None = None  # the furthest decoding time of this run

    def feed(self, packet: Any) -> int:
        """The number of the packet's run."""
        stamp = packet.pts if packet.dts is None else packet.dts
        if stamp is not None:
            time = stamp * self.time_base
            if self._last is not None and time < self._last - BACK_S:
                self.number += 1
                self._last = time
            self._last = time if self._last is None else max(self._last, time)
        return self.number


def picture_segments(
    times: np.ndarray, runs: np.ndarray, *, hole: float, step: float
) -> list[Segment]:
    """Segments of a stream whose stamps `times` (seconds) may be in any order within a run."""
    segments = []
    for run, place in _by_run(runs):
        stamps = np.sort(times[place])
        for part in np.split(stamps, np.nonzero(np.diff(stamps) > hole)[0] + 1):
            if len(part):
                segments.append(Segment(run, float(part[0]), float(part[-1]) + step))
    return segments


def _by_run(runs: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(run, where its packets are) for the runs of packets in the file's order."""
    starts = np.nonzero(np.diff(runs, prepend=-1))[0].tolist()
    for start, end in pairwise([*starts, len(runs)]):
        yield int(runs[start]), slice(start, end)


class SoundSegments:
    """Segments of a stream whose packets are stamped in order, found as they come."""

    def __init__(self, time_base: Fraction, hole: float) -> None:
        self.runs, self.hole = Runs(time_base), hole
        self.segments: list[Segment] = []

    def feed(self, packet: Any) -> None:
        run = self.runs.feed(packet)
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None:
            return
        start = stamp * self.runs.time_base
        end = start + min((packet.duration or 0) * self.runs.time_base, self.hole)
        last = self.segments[-1] if self.segments else None
        if last is None or run != last.run or start > last.end + self.hole:
            self.segments.append(Segment(run, start, end))
        else:
            last.end = max(last.end, end)


@dataclass(frozen=True)
class Repairs:
    """What was wrong with the stamps."""

    back: int = 0  # times they started anew
    ahead: int = 0  # holes that were closed
    closed_s: float = 0.0  # seconds of holes taken out

    def __bool__(self) -> bool:
        return bool(self.back or self.ahead)


@dataclass(frozen=True)
class Clock:
    """All segments, with their shifts, of the picture and of each stream of sound, by index."""

    hole: float
    segments: dict[int, list[Segment]] = field(default_factory=dict)
    repairs: Repairs = Repairs()

    def reader(self, stream: Any) -> Repairer:
        """For one pass over the packets of `stream`."""
        return Repairer(stream.time_base, self.segments.get(stream.index, []))

    def shifts(self, index: int, times: np.ndarray, runs: np.ndarray) -> np.ndarray:
        """What to add to stamps (seconds) of a stream, to each its run given."""
        out = np.zeros(len(times))
        parts: dict[int, list[Segment]] = {}
        for segment in self.segments.get(index, []):
            parts.setdefault(segment.run, []).append(segment)
        for run, place in _by_run(runs):
            if run in parts:
                number = np.searchsorted([s.start for s in parts[run]], times[place], "right") - 1
                out[place] = np.array([s.shift for s in parts[run]])[np.maximum(number, 0)]
        return out


class Repairer:
    """Puts packets of one stream on the clock, in the file's order."""

    def __init__(self, time_base: Fraction, segments: Sequence[Segment]) -> None:
        self._runs = Runs(time_base)
        ticks = 1 / float(time_base)
        self._starts: dict[int, list[int]] = {}
        self._shifts: dict[int, list[int]] = {}
        for segment in segments:
            self._starts.setdefault(segment.run, []).append(math.floor(segment.start * ticks))
            self._shifts.setdefault(segment.run, []).append(round(segment.shift * ticks))

    def repair(self, packet: Any) -> None:
        run = self._runs.feed(packet)
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None or run not in self._starts:
            return
        place = max(0, bisect_right(self._starts[run], stamp) - 1)
        shift = self._shifts[run][place]
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
            Segment(0, min(s.start for s in parts), max(s.end for s in parts))
            for parts in zip(*streams, strict=True)
        ]
        repairs = _place(whole, segments, [], hole, step)
        for stream in streams:
            for part, segment in zip(stream, whole, strict=True):
                part.shift = segment.shift
    else:
        repairs = _place(segments, segments, list(sounds.values()), hole, step)
        for stream in sounds.values():
            _place_beside(stream, segments, hole)
    return Clock(hole, {index: segments, **sounds}, repairs)


def _jump_together(streams: list[list[Segment]], hole: float) -> bool:
    if len({len(stream) for stream in streams}) != 1:
        return False
    starts = ([s.start for s in parts] for parts in zip(*streams, strict=True))
    return all(max(times) - min(times) <= hole for times in starts)


def _place(
    segments: list[Segment],
    picture: list[Segment],
    sounds: list[list[Segment]],
    hole: float,
    step: float,
) -> Repairs:
    """Gives each segment its shift. `picture` is its picture, `sounds` tell a still from a hole."""
    back = ahead = 0
    closed = 0.0
    known = [0.0]  # the last shifts, newest first
    end = segments[0].clock_end if segments else 0.0
    sane = len(segments) <= MAX_SEGMENTS
    for number, (before, segment) in enumerate(pairwise(segments), 1):
        for shift in known if sane else ():
            gap = segment.start + shift - end
            still = shift == before.shift and _sounds_on(before.end, segment.start, sounds, hole)
            if gap >= -BACK_S and (gap <= hole or still):
                segment.shift = shift
                break
        else:
            # By whole frames: the picture goes on at its rate. Sound that overlaps by less than
            # half of one gives way.
            lead = picture[number].start - segment.start
            shown = (picture[number - 1].end + before.shift - picture[0].start) / step
            heard = (end + lead - picture[0].start) / step
            frames = max(math.ceil(shown - 1e-3), round(heard))
            segment.shift = picture[0].start + frames * step - picture[number].start
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
            segment.shift = picture[0].clock_start - segment.start
        end = segment.clock_end
