"""Frames into a video file: H.264, audio carried over, complete or absent.

Used through `data.video`, which re-exports it.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc, Interpolation

from data.audio import AudioTracks
from data.video_errors import VideoError, file_name, writing

CODECS = {"h264": "libx264", "ffv1": "ffv1"}
BT709 = 1  # AVCOL_SPC_BT709; PyAV has no name for the numbers of VideoFrame.colorspace


class VideoWriter:
    """Writes frames of one size at a constant rate; a context manager.

    A path is written beside its final name and renamed on success: after an error, or when nothing
    was written, no file is left and an older one of that name is untouched.

    Even sizes are stored as yuv420p, which every player and browser shows. H.264 4:2:0 cannot say
    an odd size (its cropping counts in pairs of pixels), so odd sizes are stored as yuv444p: the
    size is kept exactly; VLC, mpv, Chrome and anything on ffmpeg play it, Safari and hardware
    decoders do not.

    Audio is copied packet by packet where the container can hold it, else encoded as AAC, and keeps
    its offset to the picture. It ends with the video when fewer frames were written than
    `audio_from` has.

    Args:
        file: A path (.mp4, .mov or .mkv), or an open binary file, which gets MP4. It must be able
            to seek unless `fragmented`.
        fps: Frames a second, kept as an exact fraction.
        codec: "h264", or "ffv1" (lossless, .mkv only).
        crf: x264's quality, 0 (lossless) to 51; 18 is hard to tell from the source.
        audio_from: The video whose audio streams are taken over.
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
        self._audio: AudioTracks | None = None
        self._path = Path(file) if isinstance(file, str | Path) else None
        self._target: Any = file
        if self._path is not None:
            # The suffix stays last: it chooses the container.
            self._target = self._path.with_name(
                f".{self._path.stem}.{os.getpid()}.part{self._path.suffix}"
            )
        odd = width % 2 or height % 2
        self._pixel_format = pixel_format or ("yuv444p" if odd else "yuv420p")
        with writing(self.name):
            self._output = self._open_output(fragmented)
            try:
                self._stream = self._add_video(codec, crf, preset, fragmented, reproducible)
                if audio_from is not None:
                    self._audio = AudioTracks(audio_from, self._output)
            except BaseException:
                self._discard()
                raise

    def _open_output(self, fragmented: bool) -> Any:
        container, options = None, {}
        if self._path is None:
            container = "mp4"
        elif self._path.suffix.lower() not in (".mp4", ".m4v", ".mov", ".mkv"):
            raise VideoError(f"{self.name}: cannot hold H.264; name the file .mp4, .mov or .mkv")
        elif not self._path.parent.is_dir():
            raise VideoError(f"{self.name}: no folder {self._path.parent}; make it first")
        if fragmented:
            options["movflags"] = "frag_keyframe+empty_moov+default_base_moof"
        elif self._path is not None and self._path.suffix.lower() != ".mkv":
            options["movflags"] = "faststart"  # a browser can start before it has the whole file
        target = self._target if self._path is None else str(self._target)
        return av.open(target, "w", format=container, options=options)

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
        context.time_base, context.thread_count = 1 / self.fps, 1 if reproducible else 0
        context.gop_size = max(1, round(self.fps)) if fragmented else 250
        # Tagged, because untagged colours are read as BT.601 by some players and BT.709 by others.
        context.colorspace, context.color_range = BT709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        return stream

    def write(self, frames: np.ndarray) -> None:
        """Adds frames, uint8 RGB `[n, height, width, 3]`, or `[n, height, width]` when gray."""
        gray = self._pixel_format == "gray"
        shape = (self.height, self.width) if gray else (self.height, self.width, 3)
        if frames.dtype != np.uint8 or frames.shape[1:] != shape:
            raise VideoError(
                f"{self.name}: frames must be uint8 [n, {', '.join(map(str, shape))}], "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        with writing(self.name):
            for picture in frames:
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
                frame.pts, frame.time_base = self.count, 1 / self.fps
                self._output.mux(self._stream.encode(frame))
                self.count += 1
                if self._audio:
                    self._audio.copy_until(self.count / self.fps)

    def close(self) -> None:
        """Finishes the file and gives it its name."""
        if self.count == 0:
            self._discard()
            raise VideoError(f"{self.name}: no frame was written, so no file was made")
        try:
            with writing(self.name):
                self._output.mux(self._stream.encode(None))
                if self._audio:
                    self._audio.finish(self.count / self.fps, 1 / self.fps)
                self._output.close()
                if self._path is not None:
                    os.replace(self._target, self._path)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        if self._audio:
            self._audio.close()
        try:
            self._output.close()
        except (av.FFmpegError, OSError):
            pass  # the error that brought us here is the one to tell
        finally:
            if self._path is not None:
                Path(self._target).unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._discard()
