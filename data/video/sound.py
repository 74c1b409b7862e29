"""Sound and subtitles of one video into another: packets copied where the container can hold them.

All of it is put on the clock of the source's picture (data/video/source/clock.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from data.video.decode import Damage
from data.video.source.container import open_video, packets
from data.video.source.survey import SOUND_BEFORE_S, Survey
from data.video.source.tracks import Track, TrackPlan, add_sound, describe


class Carrier:
    """The tracks of `plan`, handed to an open output a little at a time.

    Taking packets as the picture advances keeps the output interleaved and the memory bounded.
    What cannot be used is passed over and counted in `damage`.
    """

    def __init__(
        self, source: str | Path, found: Survey, plan: TrackPlan, output: Any, damage: Damage
    ) -> None:
        self.source, self.found, self.output, self.damage = source, found, output, damage
        self.input = open_video(source)
        try:
            self._lanes = {t.index: _lane(t, self) for t in plan.tracks}
        except BaseException:
            self.input.close()
            raise
        self._packets = self._read()
        self._waiting = next(self._packets, None)

    def _read(self) -> Iterator[tuple[Fraction, Any]]:
        """(time in the output, packet on the clock)."""
        if not self._lanes:
            return
        streams = [self.input.streams[index] for index in self._lanes]
        repairers = {stream.index: self.found.clock.reader(stream) for stream in streams}
        for packet in packets(self.input, streams):
            if packet.size == 0:
                continue
            repairers[packet.stream.index].repair(packet)
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None:
                self.damage.sound += packet.stream.type == "audio"
                continue
            time = stamp * packet.time_base - self.found.origin
            if time >= -SOUND_BEFORE_S:  # an encoder's padding; what is earlier is not heard
                yield time, packet

    def copy_until(self, time: Fraction | None) -> None:
        """Hands over what begins before `time` (seconds of output; None: everything)."""
        while self._waiting is not None:
            start, packet = self._waiting
            if time is not None and start >= time:
                return
            self._lanes[packet.stream.index].take(packet)
            self._waiting = next(self._packets, None)

    def finish(self, end: Fraction | None) -> None:
        """Hands over the rest, or up to `end` where the picture was cut short."""
        self.copy_until(end)
        for lane in self._lanes.values():
            lane.finish()
        self.close()

    def close(self) -> None:
        self.input.close()


def _lane(track: Track, carrier: Carrier) -> _Copied:
    kinds = {"audio": _Converted, "subtitle": _Text} if track.converted else {}
    return kinds.get(track.kind, _Copied)(track, carrier)


class _Copied:
    """One track, packet by packet."""

    def __init__(self, track: Track, carrier: Carrier) -> None:
        self.carrier, self.output = carrier, carrier.output
        streams: Any = carrier.input.streams
        self.stream = streams[track.index]
        self.shift = round(carrier.found.origin / self.stream.time_base)
        self.added = self.add(track)
        describe(self.stream, self.added)
        self.last: int | None = None

    def add(self, track: Track) -> Any:
        return self.output.add_stream_from_template(self.stream)

    def take(self, packet: Any) -> None:
        packet.pts = None if packet.pts is None else packet.pts - self.shift
        packet.dts = packet.pts if packet.dts is None else packet.dts - self.shift
        if self.last is not None and packet.dts is not None and packet.dts <= self.last:
            return  # two parts of a file that overlap a little: the first stays
        last, packet.stream = packet.dts, self.added
        try:
            self.output.mux(packet)
        except (av.error.InvalidDataError, av.error.ArgumentError):
            self.carrier.damage.sound += 1
        else:
            self.last = last

    def finish(self) -> None:
        """After the last packet."""


class _Converted(_Copied):
    """One track of sound, decoded and encoded anew."""

    def add(self, track: Track) -> Any:
        self._end = -math.inf  # of what was encoded, in seconds
        return add_sound(self.output, track.codec or "", self.stream)

    def take(self, packet: Any) -> None:
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError):
            self.carrier.damage.sound += 1
            return
        for frame in frames:
            if frame.pts is None:
                continue
            frame.pts -= round(self.carrier.found.origin / frame.time_base)
            start, length = float(frame.pts * frame.time_base), frame.samples / frame.sample_rate
            # Where two parts of a file overlap the first stays: an encoder would put the second
            # after it, and all that follows would be late.
            if start + length / 2 >= self._end:
                self._end = start + length
                self.output.mux(self.added.encode(frame))

    def finish(self) -> None:
        self.output.mux(self.added.encode(None))


class _Text(_Copied):
    """One track of subtitles, from MP4's framing of text to Matroska's or back."""

    def add(self, track: Track) -> Any:
        self.framed = track.codec == "mov_text"
        return self.output.add_mux_stream(track.codec)

    def take(self, packet: Any) -> None:
        data = bytes(packet)
        if self.framed:
            words = data.strip()[:0xFFFF]
            data = len(words).to_bytes(2, "big") + words
        else:
            data = data[2 : 2 + int.from_bytes(data[:2], "big")]
            if not data:
                return  # MP4 fills the time between two texts with empty ones
        text: Any = av.Packet(data)
        text.pts, text.dts = packet.pts, packet.dts
        text.duration, text.time_base = packet.duration, packet.time_base
        super().take(text)
