"""One pass over a video's packets: what is in it, in which order, on which clock."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from data.video.errors import VideoError, file_name, reason
from data.video.source.clock import (
    FILE_HOLE_S,
    STREAM_HOLE_S,
    Clock,
    Runs,
    SoundSegments,
    make_clock,
    picture_segments,
)
from data.video.source.container import REMEDY, Source, packets

MAX_FRAMES = 10_000_000  # of one file: four days at 25 a second, 160 MB of time stamps
REORDER = 16  # frames that a decoder holds back at most


@dataclass
class Scan:
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


def scan_packets(container: Any, stream: Any, sounds: list[Any], step: float, path: Source) -> Scan:
    hole = STREAM_HOLE_S if container.format.name in ("mpegts", "mpeg") else FILE_HOLE_S
    heard = {s.index: SoundSegments(s.time_base, hole) for s in sounds}
    picture = Runs(stream.time_base)
    start = _Start()
    stamps, numbers = array("q"), array("q")  # of each frame: its stamp, its run
    count = trimmed = latest = last_length = 0
    ordered = True
    for packet in packets(container, [stream, *sounds]):
        if packet.stream.index != stream.index:
            heard[packet.stream.index].feed(packet)
            continue
        run = picture.feed(packet)
        if start.frame is None:
            start.decode(packet, run)
        if packet.size == 0 or _is_hidden(packet, stream):
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
        same = bool(numbers) and numbers[-1] == run
        ordered = ordered and not (same and stamp < stamps[-1])
        if not same or stamp >= latest:
            latest, last_length = stamp, packet.duration or 0
        stamps.append(stamp)
        numbers.append(run)
    if start.frame is None:
        raise VideoError(
            f"{file_name(path)}: has a video stream but no frame ({start.why}); {REMEDY}"
        )
    times = np.frombuffer(stamps, np.int64) * float(stream.time_base)
    runs = np.frombuffer(numbers, np.int64)
    clock = make_clock(
        (stream.index, picture_segments(times, runs, hole=hole, step=step)),
        {index: sound.segments for index, sound in heard.items() if sound.segments},
        hole=hole,
        step=step,
    )
    times = times + clock.shifts(stream.index, times, runs)
    # Frames that are reordered have stamps that are not in the file's order, others have.
    reordered = bool(stream.codec_context.has_b_frames)
    lies = ordered == reordered and len(times) > 1
    # What lies before time 0 (an encoder's padding, what an edit list cuts off) is not heard.
    starts = [max(0.0, s.segments[0].clock_start) for s in heard.values() if s.segments]
    return Scan(
        clock=clock,
        times=np.sort(times),
        length=min(last_length * float(stream.time_base), hole),
        count=count,
        trimmed=trimmed,
        reorder=REORDER if lies else 0,
        disordered=not ordered and not reordered,
        sound_start=Fraction(min(starts)).limit_denominator(10**7) if starts else None,
        frame=start.frame,
        first=start.time(stream, clock),
        undecodable=start.lost,
    )


def _is_hidden(packet: Any, stream: Any) -> bool:
    """Whether the packet is a picture that others refer to and nobody sees (RFC 6386, 9.1)."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


class _Start:
    """The first frame that can be shown, and what could not be before it."""

    def __init__(self) -> None:
        self.frame: av.VideoFrame | None = None
        self.why = "its video stream holds nothing"
        self.lost = 0
        self._runs: dict[int, int] = {}  # of what went into the decoder, by its stamp

    def decode(self, packet: Any, run: int) -> None:
        if packet.pts is not None and not packet.is_discard:
            self._runs[packet.pts] = run
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError) as error:
            self.why = reason(error)
            return
        if frames:
            self.frame = frames[0]
            pts = self.frame.pts
            if pts is not None:
                came = self._runs.get(pts, run), pts
                self.lost = sum((of, stamp) < came for stamp, of in self._runs.items())

    def time(self, stream: Any, clock: Clock) -> Fraction | None:
        """When the frame is shown; None when nothing says."""
        assert self.frame is not None
        pts = self.frame.pts
        if pts is None or not clock.segments[stream.index]:
            return None
        seconds, run = np.array([pts * float(stream.time_base)]), np.array([self._runs.get(pts, 0)])
        shift = float(clock.shifts(stream.index, seconds, run)[0])
        return (pts + round(shift / float(stream.time_base))) * stream.time_base
