"""What a client may ask for, and the check of an `open` against it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve.wire.codec import HEADER
from serve.wire.protocol import Open, WireError


@dataclass(frozen=True)
class Limits:
    min_side: int = 16  # pixels
    max_side: int = 1920  # pixels
    max_pixels: int = 1280 * 720  # of one frame
    max_work_pixels: int = 1280 * 720  # of one frame as the model sees it
    min_fps: float = 1.0  # of a source: what it is charged by
    max_fps: float = 60.0  # of a source
    max_prompt: int = 2000  # characters
    open_timeout_s: float = 10.0  # for the first message
    idle_timeout_s: float = 60.0  # without a frame, while none of the session's is being edited
    stalled_reader_s: float = 60.0  # without taking an edited frame that is ready
    resume_s: float = 60.0  # a lost connection's session is kept this long
    max_sessions: int = 256  # of one front
    max_silent: int = 1024  # connections to it without a session; the oldest gives way
    max_upload: int = 512 * 2**20  # bytes of a video for /v1/edits
    max_video_frames: int = 216_000  # of it: an hour at 60 a second
    max_video_s: float = 4 * 3600.0  # seconds of it
    max_uploads: int = 16  # that come in at once at one front
    upload_idle_s: float = 10.0  # without a byte of an upload
    upload_s: float = 300.0  # for a whole upload

    def check_open(self, message: Open) -> None:
        """Raises WireError `unsupported_size` or `bad_request`, naming the value and the limit."""
        width, height = message.width, message.height
        if (
            not self.min_side <= min(width, height) <= max(width, height) <= self.max_side
            or width * height > self.max_pixels
        ):
            raise WireError(
                "unsupported_size",
                f"frames of {width}x{height} cannot be edited here; sides from {self.min_side} to "
                f"{self.max_side} pixels and at most {self.max_pixels} pixels in all",
            )
        if not (math.isfinite(message.fps) and self.min_fps <= message.fps <= self.max_fps):
            raise WireError(
                "bad_request",
                f"open.fps must lie in [{self.min_fps:g}, {self.max_fps:g}], got {message.fps}",
            )
        if message.seed is not None and not 0 <= message.seed < 2**63:
            raise WireError("bad_request", f"open.seed must lie in [0, 2^63), got {message.seed}")
        if message.received is not None:
            if message.resume is None and message.received:
                raise WireError("bad_request", "open.received means nothing without open.resume")
            if message.received < 0:
                raise WireError(
                    "bad_request", f"open.received must not be negative, got {message.received}"
                )
        self.check_prompt(message.prompt)

    def check_work_size(self, choice: str, height: int, width: int) -> None:
        """Raises WireError `unsupported_size` where the model would see too much at once."""
        if max(width, height) > self.max_side or width * height > self.max_work_pixels:
            raise WireError(
                "unsupported_size",
                f"work size {choice} is {width}x{height} here; sides up to {self.max_side} pixels "
                f"and at most {self.max_work_pixels} pixels in all: choose a smaller one",
            )

    def check_video(self, frames: int, seconds: float) -> None:
        """Raises WireError for a video that would hold an editor too long."""
        if frames > self.max_video_frames or seconds > self.max_video_s:
            raise WireError(
                "bad_request",
                f"the video has {frames} frames in {seconds:.0f} s; at most "
                f"{self.max_video_frames} frames and {self.max_video_s:.0f} s are edited here; "
                "send it in parts",
            )

    def check_prompt(self, prompt: str) -> None:
        if not prompt.strip():
            raise WireError("bad_request", "the prompt is empty; say what to change")
        if len(prompt) > self.max_prompt:
            raise WireError(
                "bad_request",
                f"the prompt has {len(prompt)} characters; at most {self.max_prompt}",
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise WireError(
                "bad_request", "the prompt holds half of a surrogate pair and is no text"
            ) from error

    def max_message(self, width: int, height: int) -> int:
        """Bytes of the largest binary message of a session: an uncompressed frame and some."""
        return HEADER.size + 3 * width * height + 64 * 1024
