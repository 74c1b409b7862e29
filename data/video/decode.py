"""Frames out of a video, each with its time: on the clock, in order, past damage, whole pictures.

What is read here is read the same way by whoever uses it: a file that is edited, a pair that is
ingested, a video that is sent to a server.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av

from data.video.errors import VideoError, file_name, reason
from data.video.source.container import REMEDY, Source, open_video, packets, video_stream
from data.video.source.survey import Survey

HELD_BYTES = 256 * 2**20  # of frames that wait for their stamps
NUDGE = Fraction(1, 8)  # of a frame: between two that have the same stamp


@dataclass
class Damage:
    """What could not be read, counted while frames are taken."""

    packets: int = 0  # that the decoder refused
    frames: int = 0  # that are there, but broken
    missing: int = 0  # that the file's packets promise and that did not come; known at the end
    sound: int = 0  # packets of sound that could not be used

    def __str__(self) -> str:
        told = [
            (self.missing, "{} frames are lost"),
            (self.packets, "{} packets could not be decoded"),
            (self.frames, "{} frames are shown broken"),
            (self.sound, "{} packets of sound are lost"),
        ]
        return ", ".join(text.format(count) for count, text in told if count)

    def __bool__(self) -> bool:
        return bool(str(self))


def decode(
    path: Source, found: Survey, *, damage: Damage | None = None, strict: bool = False
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Yields each stored frame once, with its time in seconds from `found.origin`, increasing.

    Interlaced frames come deinterlaced. With `strict` damage is a VideoError, without it it is
    counted in `damage` as long as the decoder goes past it.
    """
    damage = Damage() if damage is None else damage
    if strict:
        check_whole(path, found)
    frames = _on_clock(_whole(_decoded(path, found, damage, strict)), found)
    count, last = 0, Fraction(0)
    for time, frame in frames:
        if count and time - last > found.longest + Fraction(found.clock.hole):
            raise VideoError(
                f"{file_name(path)}: nothing can be decoded from {float(last):.1f} to "
                f"{float(time):.1f} s; {REMEDY}"
            )
        if count > 2 * found.packets + 100:
            raise VideoError(
                f"{file_name(path)}: gives more frames than its {found.packets} packets can hold; "
                f"{REMEDY}"
            )
        count, last = count + 1, time
        yield time, frame
    if count == 0:
        raise VideoError(f"{file_name(path)}: has a video stream but no frame; {REMEDY}")
    lost = found.packets - found.undecodable - count
    # Broadcasts may store the two fields of a frame apart, a packet each.
    if not (found.look.interlaced and abs(lost - count) <= 2 + count // 50):
        damage.missing += max(0, lost)
    if strict and damage:
        raise VideoError(f"{file_name(path)}: is damaged: {damage}; {REMEDY}")


def check_whole(path: Source, found: Survey) -> None:
    """Raises VideoError for a file that is cut off. What is broken inside it shows when read."""
    if found.cut_off is not None:
        raise VideoError(f"{file_name(path)}: is cut off: {found.cut_off}; get the whole file")


def _decoded(path: Source, found: Survey, damage: Damage, strict: bool) -> Iterator[av.VideoFrame]:
    with open_video(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        if strict:
            stream.codec_context.options |= {"err_detect": "explode+crccheck+bitstream+buffer"}
        repairer = found.clock.reader(stream)
        number, began = 0, False
        for packet in packets(container, [stream]):
            repairer.repair(packet)
            try:
                frames = packet.decode()
            except av.error.MemoryError as error:
                raise VideoError(
                    f"{file_name(path)}: no memory for frame {number}; give a smaller video"
                ) from error
            except (av.FFmpegError, OSError) as error:
                # A stream that is entered in its middle begins with what nobody can decode.
                damage.packets += began
                if strict and began:
                    raise VideoError(
                        f"{file_name(path)}: damaged after frame {number} ({reason(error)}); "
                        f"{REMEDY}"
                    ) from error
                continue
            for frame in frames:
                began = True
                number += 1
                damage.frames += bool(frame.is_corrupt)
                yield frame


def _whole(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Frames of two fields made whole; others as they are."""
    deinterlacer: _Deinterlacer | None = None
    for frame in frames:
        if deinterlacer is not None and not deinterlacer.takes(frame):
            yield from deinterlacer.rest()
            deinterlacer = None
        if deinterlacer is None and frame.interlaced_frame:
            deinterlacer = _Deinterlacer(frame)
        if deinterlacer is None:
            yield frame
        else:
            yield from deinterlacer.push(frame)
    if deinterlacer is not None:
        yield from deinterlacer.rest()


class _Deinterlacer:
    """FFmpeg's bwdif: one frame out for a frame in, those that are whole untouched."""

    def __init__(self, frame: av.VideoFrame) -> None:
        self._kind = _kind(frame)
        self._graph = av.filter.Graph()
        nodes = (
            self._graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=Fraction(frame.time_base or Fraction(1, 90_000)),
            ),
            self._graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"),
            self._graph.add("buffersink"),
        )
        self._graph.link_nodes(*nodes).configure()

    def takes(self, frame: av.VideoFrame) -> bool:
        return _kind(frame) == self._kind

    def push(self, frame: av.VideoFrame) -> Iterator[av.VideoFrame]:
        self._graph.push(frame)
        yield from self._ready()

    def rest(self) -> Iterator[av.VideoFrame]:
        self._graph.push(None)
        yield from self._ready()

    def _ready(self) -> Iterator[av.VideoFrame]:
        while True:
            try:
                yield self._graph.vpull()
            except (av.error.BlockingIOError, EOFError):
                return


def _kind(frame: av.VideoFrame) -> tuple[Any, ...]:
    return frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range


def _on_clock(
    frames: Iterator[av.VideoFrame], found: Survey
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Gives frames their times. They come in the order of the picture; their stamps may not."""
    step = 1 / found.rate.fps
    start = found.first - found.origin
    last: Fraction | None = None
    for stamp, frame in _in_order(frames, found):
        if stamp is None:
            time = start if last is None else last + step
        elif found.rate.grid:
            time = start + round((stamp - found.first) / step) * step
        else:
            time = stamp - found.origin
        if last is not None and time <= last:
            time = last + (step if found.rate.grid else NUDGE * step)
        last = time
        yield time, frame


def _in_order(
    frames: Iterator[av.VideoFrame], found: Survey
) -> Iterator[tuple[Fraction | None, av.VideoFrame]]:
    """Frames with stamps in order: of the next few stamps each takes the earliest."""
    held: list[av.VideoFrame] = []
    stamps: list[Fraction] = []
    depth = 0
    for frame in frames:
        stamp = _stamp(frame) if found.stamped else None
        if stamp is None or not found.reorder:
            yield stamp, frame
            continue
        depth = depth or min(found.reorder, max(2, HELD_BYTES // max(1, _size(frame))))
        held.append(frame)
        heapq.heappush(stamps, stamp)
        if len(held) > depth:
            yield heapq.heappop(stamps), held.pop(0)
    for frame in held:
        yield heapq.heappop(stamps), frame


def _stamp(frame: av.VideoFrame) -> Fraction | None:
    stamp = frame.dts if frame.pts is None else frame.pts
    return None if stamp is None else stamp * Fraction(frame.time_base or 0)


def _size(frame: av.VideoFrame) -> int:
    return sum(plane.buffer_size for plane in frame.planes)
