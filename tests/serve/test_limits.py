"""What lies on a limit is taken; one more is refused, with the limit in the message."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from serve.limits import Limits
from serve.wire.codec import HEADER
from serve.wire.protocol import Open, WireError, parse_client

LIMITS = Limits(max_prompt=5, max_video_frames=100, max_video_s=8.0)


@pytest.mark.parametrize(("frames", "seconds"), [(100, 8.0), (100, 0.0), (1, 8.0)])
def test_a_video_as_long_as_allowed_is_taken(frames: int, seconds: float) -> None:
    LIMITS.check_video(frames, seconds)


@pytest.mark.parametrize(("frames", "seconds"), [(101, 1.0), (1, 8.01)])
def test_a_longer_video_is_refused(frames: int, seconds: float) -> None:
    with pytest.raises(WireError, match=rf"{frames} frames in .* at most 100 frames and 8 s"):
        LIMITS.check_video(frames, seconds)


def test_a_prompt_as_long_as_allowed_is_taken() -> None:
    LIMITS.check_prompt("12345")
    with pytest.raises(WireError, match="6 characters; at most 5"):
        LIMITS.check_prompt("123456")


def test_the_largest_message_holds_an_uncompressed_frame_and_its_header() -> None:
    assert LIMITS.max_message(4000, 3000) == HEADER.size + 36_000_000 + 65_536


OPEN = {
    "type": "open", "prompt": "snow", "width": 64, "height": 48, "fps": 30.0, "mode": "live",
    "format": "jpeg",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 15}, "frames of 15x48 .*; sides from 16 to 1920 pixels and at most 921600 pix"),
        ({"fps": 60.5}, r"open.fps must lie in \[1, 60\], got 60.5"),
        ({"fps": 0.5}, r"open.fps must lie in \[1, 60\], got 0.5"),
        ({"seed": -1}, r"open.seed must lie in \[0, 2\^63\), got -1"),
        ({"received": 1}, "open.received means nothing without open.resume"),
        ({"received": -2, "resume": "token"}, "open.received must not be negative, got -2"),
    ],
)
def test_an_open_beyond_them_is_told_which(change: dict[str, Any], named: str) -> None:
    message = parse_client(json.dumps(OPEN | change))
    assert isinstance(message, Open)
    with pytest.raises(WireError, match=named):
        Limits().check_open(message)


def test_a_work_size_beyond_them_is_told_as_it_would_be_here() -> None:
    Limits().check_work_size("full", 480, 1920)
    for height, width in ((32, 1921), (1921, 32), (481, 1920)):
        told = f"work size full is {width}x{height} here; sides up to 1920 pixels and at most 92160"
        with pytest.raises(WireError, match=told):
            Limits().check_work_size("full", height, width)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 16, "height": 16},
        {"width": 1920, "height": 480},  # 1280 x 720 pixels, the most of one frame
        {"fps": 60.0},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"received": 0},
        {"resume": "token", "received": 0},
    ],
)
def test_an_open_on_the_limits_is_taken(change: dict[str, Any]) -> None:
    message = parse_client(json.dumps(OPEN | change))
    assert isinstance(message, Open)
    Limits().check_open(message)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"width": 15}, "unsupported_size"),
        ({"height": 15}, "unsupported_size"),
        ({"width": 1921, "height": 16}, "unsupported_size"),
        ({"width": 16, "height": 1921}, "unsupported_size"),
        ({"width": 1280, "height": 721}, "unsupported_size"),
        ({"width": 1281, "height": 720}, "unsupported_size"),
        ({"fps": 0.99}, "bad_request"),
        ({"fps": 60.01}, "bad_request"),
        ({"fps": math.nan}, "bad_request"),
        ({"seed": -1}, "bad_request"),
        ({"seed": 2**63}, "bad_request"),
        ({"received": 1}, "bad_request"),
        ({"resume": "token", "received": -1}, "bad_request"),
        ({"prompt": " "}, "bad_request"),
    ],
)
def test_an_open_beyond_a_limit_is_refused(change: dict[str, Any], code: str) -> None:
    asked: dict[str, Any] = {"prompt": "snow", "width": 64, "height": 48, "fps": 30.0}
    with pytest.raises(WireError) as raised:
        Limits().check_open(Open(**asked | change, mode="live", format="jpeg"))
    assert raised.value.code == code


def test_an_hour_at_sixty_frames_a_second_is_taken() -> None:
    assert Limits().max_video_frames == 60 * 3600
    assert Limits().max_video_s >= 3600.0
