"""What a client may ask for, and the check of an `open` against it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve.wire.protocol import HEADER, Open, WireError


@dataclass(frozen=True)
class Limits:
    min_side: int = 16  # pixels
    max_side: int = 1920
    max_pixels: int = 1280 * 720  # of one frame
    max_fps: float = 60.0
    max_prompt: int = 2000  # characters
    open_timeout_s: float = 10.0  # for the first message
    idle_timeout_s: float = 60.0  # without a frame, while none of the session's is being edited
    stalled_reader_s: float = 60.0  # without taking an edited frame that is ready
    resume_s: float = 60.0  # a lost connection's session is kept this long
    max_sessions: int = 256  # of one front
    max_upload: int = 512 * 2**20  # bytes of a video for /v1/edits

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
        if not (math.isfinite(message.fps) and 0 < message.fps <= self.max_fps):
            raise WireError(
                "bad_request", f"open.fps must lie in (0, {self.max_fps:g}], got {message.fps}"
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
