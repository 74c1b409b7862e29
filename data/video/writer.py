"""Frames into a video file: H.264, sound and the rest carried over, complete or absent.

Used through `data.video`, which re-exports it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc, Interpolation

from data.video.decode import Damage
from data.video.errors import VideoError, file_name, writing
from data.video.output import check_output, output_format, part_name
from data.video.sound import Carrier
from data.video.source.container import file_url, open_video
from data.video.source.survey import Survey, survey
from data.video.source.tracks import plan_tracks

CODECS = {"h264": "libx264", "ffv1": "ffv1"}
BT709 = 1  # AVCOL_SPC_BT709; PyAV has no name for the numbers of VideoFrame.colorspace


class VideoWriter:
    """Writes frames of one size; a context manager.

    A path is written beside its final name and renamed on success: after an error, or when nothing
    was written, no file is left and an older one of that name is untouched.

    Even sizes are stored as yuv420p, which every player and browser shows. H.264 4:2:0 cannot say
    an odd size (its cropping counts in pairs of pixels), so odd sizes are stored as yuv444p: the
    size is kept exactly; VLC, mpv, Chrome and anything on ffmpeg play it, Safari and hardware
    decoders do not.

    Sound and subtitles are copied packet by packet where the container can hold them, else
    converted or left out (`source.tracks`; `differences` says which), and keep their place beside
    the picture; so do chapters, time code and titles. They end with the picture when fewer
    frames were written than `audio_from` has.

    Args:
        file: A path (.mp4, .mov or .mkv), or an open binary file, which gets MP4. It must be able
            to seek unless `fragmented`.
        fps: Frames a second, kept as an exact fraction.
        codec: "h264", or "ffv1" (lossless, .mkv only).
        crf: x264's quality, 0 (lossless) to 51; 18 is hard to tell from the source.
        audio_from: The video whose sound and other tracks are taken over.
        tick: Seconds that times are kept to, for frames that come with times of their own; by
            default 1/fps.
        damage: Counts sound that cannot be used, and tells what is missing of the picture.
        fragmented: MP4 in pieces of a second that can be sent while it is written.
        pixel_format: Instead of the choice above, for example "yuv444p", or "gray" for `[n, H, W]`.
        reproducible: The same bytes for the same frames at every run: one thread, and none of
            x264's look-ahead, whose decisions were found to vary between runs.

    Raises:
        VideoError: names the file; also for a full disk and for containers that cannot hold H.264.
    """

    def __init__(
        self,
        file: str | Path | BinaryIO,
        width: int,
        height: int,
        fps: Fraction | float,
        *,
        codec: str = "h264",
        crf: int = 18,
        preset: str = "medium",
        audio_from: str | Path | None = None,
        tick: Fraction | None = None,
        damage: Damage | None = None,
        fragmented: bool = False,
        pixel_format: str | None = None,
        reproducible: bool = False,
    ) -> None:
        if width < 2 or height < 2:
            raise VideoError(f"{file_name(file)}: a video needs at least 2x2, got {width}x{height}")
        if codec not in CODECS:
            raise VideoError(f"{file_name(file)}: no codec {codec!r}; choose from {sorted(CODECS)}")
        self.name, self.width, self.height = file_name(file), width, height
        self.fps = Fraction(fps).limit_denominator(100_000)
        if self.fps <= 0:
            raise VideoError(f"{self.name}: fps must be above 0, got {fps}")
        self.count = 0  # frames written
        self.damage = Damage() if damage is None else damage
        self._tick = tick or 1 / self.fps
        self._held: tuple[av.VideoFrame, int] | None = None  # the last frame, with its tick
        self._lengths: dict[int, int] = {}  # of the frames in the encoder, in ticks
        self._found: Survey | None = None
        self._start = Fraction(0)  # of the first frame, when frames come without times
        self._carrier: Carrier | None = None
        self._path = Path(file) if isinstance(file, str | Path) else None
        self._target: Any = file
        if self._path is not None:
            check_output(self._path)
            self._target = part_name(self._path)
        odd = width % 2 or height % 2
        self._pixel_format = pixel_format or ("yuv444p" if odd else "yuv420p")
        with writing(self.name):
            self._output = self._open_output(fragmented)
            try:
                self._stream = self._add_video(codec, crf, preset, fragmented, reproducible)
                if audio_from is not None:
                    self._carry(audio_from, fragmented)
            except BaseException:
                self._discard()
                raise

    def _open_output(self, fragmented: bool) -> Any:
        container = "mp4" if self._path is None else output_format(self._path)
        options = {}
        if fragmented:
            options["movflags"] = "frag_keyframe+empty_moov+default_base_moof"
        elif self._path is not None and container != "matroska":
            options["movflags"] = "faststart"  # a browser can start before it has the whole file
        target = self._target if self._path is None else file_url(self._target)
        return av.open(target, "w", format=container, options=options)

    def _carry(self, source: str | Path, fragmented: bool) -> None:
        try:
            self._found = found = survey(source)
        except VideoError as error:
            raise VideoError(f"{source}: its audio cannot be read ({error})") from error
        self._start = found.first - found.origin
        with open_video(source) as container:
            plan = plan_tracks(container, found, self._output.format.name, fragmented=fragmented)
            self._output.metadata.update(plan.metadata)
            if plan.chapters and not fragmented:
                self._output.set_chapters(list(plan.chapters))
        if plan.timecode:
            self._stream.metadata["timecode"] = plan.timecode
        self._carrier = Carrier(source, found, plan, self._output, self.damage)

    def _add_video(
        self, codec: str, crf: int, preset: str, fragmented: bool, reproducible: bool
    ) -> Any:
        options = {}
        if codec == "h264":
            options = {"crf": str(crf), "preset": preset}
            if fragmented or reproducible:
                # No look-ahead and no reordering: a fragment's frames leave as they come.
                options["tune"] = "zerolatency"
        stream = self._output.add_stream(CODECS[codec], rate=self.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, self._pixel_format
        context = stream.codec_context
        context.time_base, context.thread_count = self._tick, 1 if reproducible else 0
        context.gop_size = max(1, round(self.fps)) if fragmented else 250
        # Tagged, because untagged colours are read as BT.601 by some players and BT.709 by others.
        context.colorspace, context.color_range = BT709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        return stream

    def write(self, frames: np.ndarray, times: Sequence[Fraction] | None = None) -> None:
        """Adds frames, uint8 RGB `[n, height, width, 3]`, or `[n, height, width]` when gray.

        `times` are seconds from the beginning of the output, increasing; without them the next
        places at `fps`.
        """
        gray = self._pixel_format == "gray"
        shape = (self.height, self.width) if gray else (self.height, self.width, 3)
        if frames.dtype != np.uint8 or frames.shape[1:] != shape:
            raise VideoError(
                f"{self.name}: frames must be uint8 [n, {', '.join(map(str, shape))}], "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        if times is None:
            times = [self._start + (self.count + n) / self.fps for n in range(len(frames))]
        with writing(self.name):
            for picture, time in zip(frames, times, strict=True):
                layout = "gray" if gray else "rgb24"
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=layout)
                if not gray:
                    frame = frame.reformat(
                        format=self._pixel_format,
                        dst_colorspace="ITU709",
                        dst_color_range="MPEG",
                        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
                        threads=1,
                    )
                self._add(frame, round(time / self._tick))
                self.count += 1

    def _add(self, frame: av.VideoFrame, place: int) -> None:
        if self._held is not None:
            place = max(place, self._held[1] + 1)
            self._encode(place)
        self._held = frame, place

    def _encode(self, until: int) -> None:
        """Encodes the frame that was held, now that it is known how long it is shown."""
        assert self._held is not None
        frame, place = self._held
        frame.pts, frame.time_base = place, self._tick
        self._lengths[place] = until - place
        self._mux(self._stream.encode(frame))
        if self._carrier:
            self._carrier.copy_until(until * self._tick)

    def _mux(self, packets: list[Any], last_length: int = 0) -> None:
        for packet in packets:
            # The encoder knows the mean rate only; of the last frame nothing else tells the length.
            packet.duration = self._lengths.pop(packet.pts)
        if last_length and packets and self._output.format.name != "matroska":
            # MP4 counts lengths in the order of decoding: a track lasts as long as its last there.
            packets[-1].duration = max(packets[-1].duration, last_length)
        self._output.mux(packets)

    def close(self) -> None:
        """Finishes the file and gives it its name."""
        if self._held is None:
            self._discard()
            raise VideoError(f"{self.name}: no frame was written, so no file was made")
        try:
            with writing(self.name):
                end, cut = self._end(self._held[1])
                self._encode(end)
                self._mux(self._stream.encode(None), end - self._held[1])
                if self._carrier:
                    self._carrier.finish(end * self._tick if cut else None)
                self._output.close()
                if self._path is not None:
                    os.replace(self._target, self._path)
        except BaseException:
            self._discard()
            raise

    def _end(self, last: int) -> tuple[int, bool]:
        """Where the last frame, at tick `last`, ends, and whether the source goes on after it."""
        step = max(1, round(1 / self.fps / self._tick))
        if self._found is None:
            return last + step, False
        found = self._found
        if last + step < (found.end - found.length - found.origin) / self._tick:
            return last + step, not self.damage.missing
        return last + max(1, round(found.length / self._tick)), False

    def _discard(self) -> None:
        if self._carrier:
            self._carrier.close()
        try:
            self._output.close()
        except (av.FFmpegError, OSError):
            pass  # the error that brought us here is the one to tell
        finally:
            if self._path is not None:
                Path(self._target).unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self._discard()
