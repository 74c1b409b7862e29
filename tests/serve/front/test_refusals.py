"""Every mistake that a client of the stream can make, and what it is told: one list.

Taking a refusal out of the server makes its line here fail. Sizes, limits and times are tried at
their border and one beyond.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.limits import Limits
from serve.tenants import Tenants
from serve.wire import codec
from serve.wire.codes import CODES, Code
from serve.wire.protocol import MAX_TEXT
from tests.serve.front.arithmetic import SIDE, source
from tests.serve.front.world import OPEN, World, frames
from tests.serve.tokens import write_tokens

LIMITS = Limits()


PROMPT = {"type": "prompt", "prompt": "prompt 1"}


CLOSE = {"type": "close"}


FRAME = SIDE * SIDE * 3  # bytes


def opening(**change: Any) -> str:
    return json.dumps({k: v for k, v in (OPEN | change).items() if v != "absent"})


def image(index: int, data: bytes, flags: int = 0) -> bytes:
    return struct.pack("<IIQ", index, flags, 0) + data


def large(format: str) -> dict[str, Any]:
    return {"format": format, "width": 64, "height": 64}


# What is sent, one message after the other; the error's code and a word of its message.
MISTAKES: dict[str, tuple[list[str | bytes | dict[str, Any]], Code, str]] = {
    "a binary first message": ([frames(0, 1)[0]], "bad_request", "must be open, got a binary"),
    "close before open": ([CLOSE], "bad_request", "first message must be open"),
    "prompt before open": ([PROMPT], "bad_request", "first message must be open"),
    "no JSON": (["hello"], "bad_request", "JSON"),
    "no object": (["[1]"], "bad_request", "object, got list"),
    "no type": (["{}"], "bad_request", "type"),
    "a server's type": (['{"type":"opened"}'], "bad_request", "type"),
    "an unhashable type": (['{"type":["open"]}'], "bad_request", "type"),
    "endless nesting": (["[" * 5000], "bad_request", "JSON"),
    "a long message": ([" " * (MAX_TEXT + 1)], "bad_request", str(MAX_TEXT + 1)),
    "an unknown field": ([opening(size=3)], "bad_request", "size"),
    **{
        f"no {name}": ([opening(**{name: "absent"})], "bad_request", f"open.{name} is missing")
        for name in ("prompt", "width", "height", "fps", "mode", "format")
    },
    **{
        f"{name} {value!r}": ([opening(**{name: value})], "bad_request", f"open.{name}")
        for name, value in (
            ("width", "64"), ("width", 64.5), ("width", True), ("height", None), ("height", [16]),
            ("fps", "16"), ("fps", True), ("prompt", None), ("prompt", 3), ("mode", "fast"),
            ("mode", 1), ("format", "gif"), ("format", {}), ("seed", 1.5), ("seed", True),
            ("resume", 5), ("received", "9"), ("mask", 1), ("work_size", 2), ("detail", "on"),
        )
    },
    "fps 0": ([opening(fps=0)], "bad_request", "open.fps"),
    "negative fps": ([opening(fps=-1)], "bad_request", "open.fps"),
    "too many fps": ([opening(fps=60.001)], "bad_request", "open.fps"),
    "endless fps": ([opening(fps=float("inf"))], "bad_request", "open.fps"),
    "no number of fps": ([opening(fps=float("nan"))], "bad_request", "open.fps"),
    **{
        f"{name} {sign}beyond all numbers": (
            [opening(**{name: int(f"{sign}1") * 10**400})], "bad_request", f"open.{name} must be"
        )
        for name in ("width", "height", "fps", "seed", "received")
        for sign in ("", "-")
    },
    "a negative seed": ([opening(seed=-1)], "bad_request", "open.seed"),
    "a seed too large": ([opening(seed=2**63)], "bad_request", "open.seed"),
    "received without resume": ([opening(received=1)], "bad_request", "without open.resume"),
    "received below 0": ([opening(resume="t", received=-1)], "bad_request", "negative"),
    "an unknown token": ([opening(resume="t", received=0)], "bad_request", "unknown or older"),
    "an empty prompt": ([opening(prompt=" \n")], "bad_request", "empty"),
    "a long prompt": ([opening(prompt="x" * 2001)], "bad_request", "2001 characters"),
    "half a surrogate pair": ([opening(prompt="\ud800")], "bad_request", "surrogate"),
    "too narrow": ([opening(width=15)], "unsupported_size", "15x16"),
    "too low": ([opening(height=15)], "unsupported_size", "16x15"),
    "too wide": ([opening(width=1921)], "unsupported_size", "1921x16"),
    "too high": ([opening(height=1921)], "unsupported_size", "16x1921"),
    "too many pixels": ([opening(width=1281, height=720)], "unsupported_size", "1281x720"),
    "open twice": ([OPEN, OPEN], "bad_request", "open already"),
    "an empty prompt later": ([OPEN, PROMPT | {"prompt": ""}], "bad_request", "empty"),
    "a long prompt later": ([OPEN, PROMPT | {"prompt": "x" * 2001}], "bad_request", "2001"),
    "a prompt after close": ([OPEN, frames(0, 1)[0], CLOSE, PROMPT], "bad_request", "after close"),
    "a frame after close": ([OPEN, CLOSE, frames(0, 1)[0]], "bad_request", "after close"),
    "close twice": ([OPEN, CLOSE, CLOSE], "bad_request", "twice"),
    "a frame left out": ([OPEN, frames(1, 1)[0]], "bad_frame", "frame 0 must come next, got 1"),
    "a frame repeated": ([OPEN, *frames(0, 2), frames(1, 1)[0]], "bad_frame", "2 must come next"),
    "a header without image": ([OPEN, bytes(16)], "bad_frame", "got 16 bytes"),
    "flags": ([OPEN, image(0, bytes(FRAME), 1)], "bad_frame", "flags of frame 0"),
    "a byte too few": ([OPEN, image(0, bytes(FRAME - 1))], "bad_frame", f"{FRAME} bytes"),
    "a byte too many": ([OPEN, image(0, bytes(FRAME + 1))], "bad_frame", f"{FRAME} bytes"),
    "too large for any image": ([OPEN, bytes(16 + FRAME + 65537)], "bad_frame", "at most"),
    **{
        f"another size in {format}": (
            [OPEN | large(format), image(0, codec.encode(source(0), format))],
            "bad_frame",
            "64x64, got 16x16",
        )
        for format in ("jpeg", "png", "webp")
    },
    "another format": (
        [OPEN | {"format": "jpeg"}, image(0, codec.encode(source(0), "png"))],
        "bad_frame",
        "readable jpeg",
    ),
    "half an image": (
        [OPEN | {"format": "png"}, image(0, codec.encode(source(0), "png")[:60])],
        "bad_frame",
        "readable png",
    ),
}  # fmt: skip


# The same at the border: all of it is taken.
FINE: dict[str, list[str | bytes | dict[str, Any]]] = {
    "the longest message": [opening() + " " * (MAX_TEXT - len(opening()))],
    "the most fps": [opening(fps=60)],
    "few fps": [opening(fps=1)],
    "seed 0": [opening(seed=0)],
    "the largest seed": [opening(seed=2**63 - 1)],
    "received 0 without resume": [opening(received=0)],
    "the longest prompt": [opening(prompt="0" * 2000)],
    "optional fields null": [opening(seed=None, resume=None, received=None, mask=None)],
    "the most pixels": [opening(width=1280, height=720)],
    "the widest": [opening(width=1920)],
    "the highest": [opening(height=1920)],
    "the longest prompt later": [opening(), {"type": "prompt", "prompt": "0" * 2000}],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_with_its_name(name: str) -> None:
    said, code, named = MISTAKES[name]
    with World() as world:
        world.editors.chunk_s = 10.0  # so that no close is over before the next message
        wire = world.connect()
        for message in said:  # one by one, as a live client's messages come
            wire.say(message)
            world.settle()
        error = wire.messages[-1]
        assert (error["type"], error["code"]) == ("error", code)
        assert named in error["message"]
        assert "retry_after_s" not in error
        assert wire.code == CODES[code].close
        assert wire.task.done()
        # The session is over for good, wherever it stood.
        assert len(world.store) == 0
        assert world.editors.open == 0
        admitted = wire.messages[0]["type"] == "opened"
        assert world.sample("sessions_admitted_total") == admitted
        assert world.sample("sessions_refused_total", code=code) == (not admitted)
        assert world.sample("sessions_ended_total", reason=code) == admitted
        assert world.sample("sessions") == 0


@pytest.mark.parametrize("name", FINE)
def test_what_is_just_allowed_is_taken(name: str) -> None:
    with World() as world:
        wire = world.connect(*FINE[name])
        assert [message["type"] for message in wire.messages] == ["opened"]
        assert wire.code is None


def test_the_subprotocol_must_be_offered_and_is_accepted() -> None:
    with World() as world:
        wire = world.connect(OPEN, subprotocols=("other",))
        assert wire.messages[0]["code"] == "bad_request"
        assert "offer the WebSocket subprotocol liveedit.v1" in wire.messages[0]["message"]


def test_a_token_is_wanted_where_there_are_tokens(tmp_path: Path) -> None:
    with World(tenants=Tenants(str(write_tokens(tmp_path / "tokens")))) as world:
        for query, right in (("", False), ("token=secre", False), ("token=secret", True)):
            wire = world.connect(OPEN, query=query)
            first = wire.messages[0]
            assert (first["type"] == "opened") is right
            assert right or (first["code"], wire.code) == ("unauthorized", 1008)
            assert right or "with liveedit --token TOKEN" in first["message"]
        assert world.sample("sessions_refused_total", code="unauthorized", tenant="") == 2
        assert world.sample("sessions_admitted_total", tenant="ours") == 1


def interrupted(world: World, **change: Any) -> str:
    """The token of a session of one chunk whose connection was cut."""
    wire = world.connect(OPEN | change, *frames(0, 12))
    wire.disconnect()
    world.settle()
    return str(wire.messages[0]["resume"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 32}, "width 16, open says 32"),
        ({"height": 32}, "height 16, open says 32"),
        ({"mode": "live"}, "mode 'lossless', open says 'live'"),
        ({"format": "png"}, "format 'rgb24', open says 'png'"),
        ({"received": 10}, "from 0 to 9 edited frames"),
    ],
)
def test_a_session_is_resumed_as_it_was(change: dict[str, Any], named: str) -> None:
    with World() as world:
        resume = OPEN | {"resume": interrupted(world), "received": 9}
        wire = world.connect(resume | change)
        assert wire.messages[0]["code"] == "bad_request"
        assert named in wire.messages[0]["message"]
        assert wire.code == 1008
        # A mistake of the one who asks is no end of the session.
        right = world.connect(resume)
        assert right.messages[0]["type"] == "opened"
        assert right.messages[0]["next_frame"] == 9


@pytest.mark.parametrize(("after", "taken"), [(59.9, True), (60.1, False)])
def test_a_token_is_good_for_a_minute(after: float, taken: bool) -> None:
    with World() as world:
        token = interrupted(world)
        world.advance(after)
        answer = world.connect(OPEN | {"resume": token}).messages[0]
        assert (answer["type"] == "opened") is taken


@pytest.mark.parametrize(("code", "kept"), [("internal", True), ("bad_frame", False)])
def test_what_was_the_servers_fault_can_be_resumed(code: str, kept: bool) -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, 12))
        if kept:
            world.editors.fail()
        else:
            wire.say(b"noise")
        world.settle()
        assert wire.messages[-1]["code"] == code
        answer = world.connect(OPEN | {"resume": wire.messages[0]["resume"]}).messages[0]
        assert (answer["type"] == "opened") is kept


def test_images_come_in_the_sessions_format() -> None:
    for format, kind in (("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        with World() as world:
            sent = [image(n, codec.encode(source(n), format)) for n in range(9)]
            wire = world.connect(OPEN | {"format": format}, *sent)
            for frame in wire.frames:
                shown = codec.decode(frame.image, format, width=SIDE, height=SIDE)
                assert np.abs(shown[..., 0].astype(int) - frame.index).max() <= 3
            assert Image.open(io.BytesIO(wire.frames[0].image)).format == kind
