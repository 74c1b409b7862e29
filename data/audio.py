"""Audio of one video into another: packets copied where the container can hold them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from data.video_errors import VideoError, reason

# What players find in an MP4; the muxer accepts more (raw PCM, for one) than they play.
PLAYED_IN_MP4 = {"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"}


class AudioTracks:
    """All audio streams of `source`, handed to an open output a little at a time.

    Taking packets as the picture advances keeps the output interleaved and the memory bounded.
    Times count from the source's first video frame, so sound and picture keep their offset.
    """

    def __init__(self, source: str | Path, output: Any) -> None:
        self.source, self.output = source, output
        try:
            self.input = av.open(str(source), "r")
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{source}: its audio cannot be read ({reason(error)})") from error
        video: Any = self.input.streams.video[0] if self.input.streams.video else None
        start = video.start_time * video.time_base if video and video.start_time else 0
        self.origin = Fraction(start)
        length = video.duration * video.time_base if video and video.duration else None
        self.video_end = Fraction(length) if length else None
        self.outputs = {stream.index: self._add(stream) for stream in self.input.streams.audio}
        self.packets = self._read()
        self.waiting = next(self.packets, None)

    def _add(self, stream: Any) -> Any:
        if stream.codec_context is None:
            raise VideoError(
                f"{self.source}: audio stream {stream.index} has an unknown codec; "
                "convert it first, for example `ffmpeg -i IN -c:v copy -c:a aac OUT.mp4`"
            )
        mp4 = self.output.format.name in ("mp4", "mov", "ipod")
        holds = PLAYED_IN_MP4 if mp4 else self.output.supported_codecs
        if stream.codec_context.codec.canonical_name in holds:
            return self.output.add_stream_from_template(stream)
        added = self.output.add_stream("aac", rate=stream.rate)
        added.layout = "stereo" if stream.channels > 1 else "mono"
        added.bit_rate = 192_000
        return added

    def _read(self) -> Iterator[Any]:
        if not self.outputs:
            return
        try:
            for packet in self.input.demux(list(self.input.streams.audio)):
                if packet.pts is not None:  # the empty packets at the end have no time
                    yield packet
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{self.source}: its audio is damaged ({reason(error)})") from error

    def copy_until(self, time: Fraction | None) -> None:
        """Hands over what begins before `time` (seconds of output; None: everything)."""
        while self.waiting is not None:
            packet = self.waiting
            if time is not None and packet.pts * packet.time_base - self.origin >= time:
                return
            self._hand_over(packet)
            self.waiting = next(self.packets, None)

    def _hand_over(self, packet: Any) -> None:
        output = self.outputs[packet.stream.index]
        if output.codec_context.is_encoder if output.codec_context else False:
            for frame in packet.decode():
                frame.pts -= round(self.origin / frame.time_base)
                self.output.mux(output.encode(frame))
            return
        shift = round(self.origin / packet.time_base)
        packet.pts -= shift
        packet.dts = None if packet.dts is None else packet.dts - shift
        packet.stream = output
        self.output.mux(packet)

    def finish(self, end: Fraction, step: Fraction) -> None:
        """Hands over the rest, or up to `end` where the video was cut by more than a frame."""
        cut = self.video_end is not None and end < self.video_end - step
        self.copy_until(end if cut else None)
        for output in self.outputs.values():
            if output.codec_context and output.codec_context.is_encoder:
                self.output.mux(output.encode(None))
        self.close()

    def close(self) -> None:
        self.input.close()
