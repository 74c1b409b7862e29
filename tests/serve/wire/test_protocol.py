from __future__ import annotations

import dataclasses
import json
import pickle
import re
from dataclasses import asdict
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.runtime.paths import ROOT
from serve.limits import Limits
from serve.wire.codec import Frame, parse_frame
from serve.wire.codes import CODES, Code, javascript
from serve.wire.protocol import (
    CLIENT_TYPES,
    LARGEST,
    MAX_TEXT,
    NAMES,
    SERVER_TYPES,
    Chunk,
    Close,
    Closed,
    Dropped,
    Error,
    InQueue,
    Mask,
    Open,
    Opened,
    Prompt,
    PromptApplied,
    QualityApplied,
    WireError,
    parse_client,
    parse_server,
    to_json,
)

PAGE = ROOT / "serve" / "web" / "codes.js"
OPEN = {
    "type": "open",
    "prompt": "make it red",
    "width": 64,
    "height": 48,
    "fps": 16,
    "mode": "live",
    "format": "jpeg",
}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_is_as_large_as_one_may_be_and_no_larger(sign: int) -> None:
    """What a size or a rate beyond that is, the limits say."""
    opened = parse_client(json.dumps(OPEN | {"width": sign * LARGEST}))
    assert isinstance(opened, Open)
    assert opened.width == sign * LARGEST
    with pytest.raises(WireError, match=r"open\.width must be int"):
        parse_client(json.dumps(OPEN | {"width": sign * (LARGEST + 1)}))


def test_open_as_the_design_page_writes_it() -> None:
    assert parse_client(json.dumps(OPEN)) == Open("make it red", 64, 48, 16, "live", "jpeg")
    full = OPEN | {"seed": 3, "resume": "abc", "received": 12, "mode": "lossless"}
    assert parse_client(json.dumps(full)) == Open(
        "make it red", 64, 48, 16, "lossless", "jpeg", seed=3, resume="abc", received=12
    )
    null = OPEN | {"seed": None, "resume": None}
    assert parse_client(json.dumps(null)) == parse_client(json.dumps(OPEN))


@pytest.mark.parametrize(
    "message",
    [
        Open("p", 64, 48, 16.5, "live", "png", seed=1, resume="t", received=4, mask=True),
        Prompt("p"),
        Close(),
    ],
)
def test_client_messages_survive_the_wire(message: Open | Prompt | Close) -> None:
    assert parse_client(to_json(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Opened("s", "t", "m", 12, 9, 64, 48, 0),
        Chunk(1, 9, 12, 50.0, 40.0, 0.5, 4),
        Mask(1, 3, 2, 3, "AA=="),
        PromptApplied("p", 21),
        Dropped(3, 2),
        QualityApplied("size", 21, "416x240", 4),
        Closed(30, "close"),
        Error("at_capacity", "m", 5.0),
        Error("internal", "m"),
    ],
)
def test_server_messages_survive_the_wire(message: Opened) -> None:
    assert parse_server(to_json(message)) == message


def test_absent_optional_fields_are_not_sent() -> None:
    assert json.loads(to_json(Error("internal", "m"))) == {
        "type": "error",
        "code": "internal",
        "message": "m",
    }


def test_messages_of_a_later_version_are_passed_over_by_clients() -> None:
    assert parse_server('{"type":"weather","rain":1}') is None
    assert parse_server('{"type":"dropped","first_frame":3,"frames":2,"why":"x"}') == Dropped(3, 2)


@pytest.mark.parametrize("length", [MAX_TEXT, MAX_TEXT + 1])
def test_a_message_is_read_up_to_its_largest_length(length: int) -> None:
    text = to_json(Prompt(""))
    text = to_json(Prompt("x" * (length - len(text))))
    if length == MAX_TEXT:
        assert isinstance(parse_client(text), Prompt)
    else:
        with pytest.raises(WireError, match=f"of {length} characters; at most {MAX_TEXT}$"):
            parse_client(text)


@pytest.mark.parametrize(
    ("length", "shown"), [(58, "'" + "x" * 58 + "'"), (59, "'" + "x" * 56 + "...")]
)
def test_of_a_wrong_value_sixty_characters_are_shown(length: int, shown: str) -> None:
    with pytest.raises(WireError) as raised:
        parse_client(json.dumps(OPEN | {"mode": "x" * length}))
    assert raised.value.message.endswith(f", got {shown}")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "JSON"),
        ("[1]", "object"),
        ('"open"', "object"),
        ("{}", "type"),
        ('{"type":"opened"}', "type"),
        ('{"type":["open"]}', "type"),
        (json.dumps(OPEN | {"size": 3}), "size"),
        (json.dumps({k: v for k, v in OPEN.items() if k != "fps"}), "open.fps"),
        (json.dumps(OPEN | {"width": "64"}), "open.width"),
        (json.dumps(OPEN | {"width": 64.5}), "open.width"),
        (json.dumps(OPEN | {"width": True}), "open.width"),
        (json.dumps(OPEN | {"fps": "16"}), "open.fps"),
        (json.dumps(OPEN | {"mode": "fast"}), "open.mode"),
        (json.dumps(OPEN | {"format": "gif"}), "open.format"),
        (json.dumps(OPEN | {"work_size": 2}), "open.work_size"),
        (json.dumps(OPEN | {"detail": "on"}), "open.detail must be one of ('source', 'off')"),
        (json.dumps(OPEN | {"prompt": None}), "open.prompt"),
        ('{"type":"prompt","prompt":7}', "prompt.prompt"),
        ('{"type":"close","now":true}', "now"),
        ("[" * 5000, "JSON"),
        ('{"type":"prompt","prompt":"' + "x" * 70_000 + '"}', "70029 characters"),
    ],
)
def test_a_wrong_message_is_named(text: str, named: str) -> None:
    with pytest.raises(WireError) as raised:
        parse_client(text)
    assert raised.value.code == "bad_request"
    assert named in raised.value.message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"width": 8}, "unsupported_size"),
        ({"width": -64}, "unsupported_size"),
        ({"width": 4000}, "unsupported_size"),
        ({"width": 1900, "height": 1000}, "unsupported_size"),
        ({"fps": 0}, "bad_request"),
        ({"fps": 61}, "bad_request"),
        ({"fps": float("nan")}, "bad_request"),
        ({"seed": -1}, "bad_request"),
        ({"seed": 2**63}, "bad_request"),
        ({"received": 3}, "bad_request"),
        ({"resume": "t", "received": -1}, "bad_request"),
        ({"prompt": "  "}, "bad_request"),
        ({"prompt": "x" * 2001}, "bad_request"),
        ({"prompt": "\ud800"}, "bad_request"),
    ],
)
def test_limits(change: dict[str, object], code: str) -> None:
    message = parse_client(json.dumps(OPEN | change))
    assert isinstance(message, Open)
    with pytest.raises(WireError) as raised:
        Limits().check_open(message)
    assert raised.value.code == code


def test_frame_header_is_16_bytes_little_endian() -> None:
    data = Frame(258, 2**33, b"image").to_bytes()
    assert data == bytes([2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]) + b"image"
    assert parse_frame(data) == Frame(258, 2**33, b"image")


@pytest.mark.parametrize("data", [b"", b"x" * 16, bytes(4) + b"\x01" + bytes(11) + b"image"])
def test_a_wrong_frame_is_refused(data: bytes) -> None:
    with pytest.raises(WireError) as raised:
        parse_frame(data)
    assert raised.value.code == "bad_frame"


def test_every_error_has_a_close_code_and_a_status() -> None:
    told = {code: (CODES[code].close, CODES[code].status) for code in get_args(Code)}
    assert told == {  # RFC 6455, IANA's list, RFC 9110
        "bad_request": (1008, 400),  # policy violation
        "unauthorized": (1008, 401),
        "unsupported_size": (1008, 422),
        "bad_frame": (1007, 400),  # invalid payload
        "at_capacity": (1013, 503),  # try again later
        "too_slow": (1008, 408),
        "draining": (1012, 503),  # service restart: come back at once
        "internal": (1011, 500),
    }


def test_after_what_errors_a_session_goes_on() -> None:
    def those(name: str) -> set[str]:
        return {code for code, fate in CODES.items() if getattr(fate, name)}

    assert those("kept") == {"at_capacity", "draining", "internal", "too_slow"}
    assert those("resume") == {"at_capacity", "draining", "internal"}
    assert those("again") == {"draining"}


def test_the_page_has_the_same_table() -> None:
    assert PAGE.read_text() == javascript(), "python -m serve.wire.codes makes it"
    told = PAGE.read_text().partition("FATES = ")[2].rstrip(";\n")
    names = re.sub(r"(?m)^  (\w+):", r'"\1":', told).replace("},\n}", "}\n}")
    assert json.loads(names) == {code: asdict(fate) for code, fate in CODES.items()}


def is_int(value: Any) -> bool:
    return isinstance(value, int)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        *(st.from_type(kind) for kind in (*CLIENT_TYPES.values(), *SERVER_TYPES.values()))
    ).filter(lambda message: all(abs(n) <= LARGEST for n in vars(message).values() if is_int(n)))
)
def test_every_message_survives_the_wire(message: Any) -> None:
    """Both ways, with every field at any value of its type; None is not sent."""
    text = to_json(message)
    sent = json.loads(text)
    assert sent.pop("type") == NAMES[type(message)]
    # As text, in which a NaN is like another and 1.0 is not 1.
    assert repr(sent) == repr({name: v for name, v in vars(message).items() if v is not None})
    parse = parse_client if type(message) in CLIENT_TYPES.values() else parse_server
    assert repr(parse(text)) == repr(message)


def test_the_types_are_those_of_the_design_page() -> None:
    assert set(CLIENT_TYPES) == {"open", "prompt", "close"}
    assert set(SERVER_TYPES) == {
        "queued", "opened", "chunk", "mask", "prompt_applied", "quality", "dropped", "closed",
        "error",
    }  # fmt: skip


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(min_size=1, max_size=40))
def test_every_frame_survives_the_wire(index: int, time_us: int, image: bytes) -> None:
    frame = Frame(index, time_us, image)
    assert parse_frame(frame.to_bytes()) == frame


def test_what_is_optional_may_be_left_out_and_nothing_else() -> None:
    """Of every message, either way; a server's may have more than we know."""
    for name, kind in (CLIENT_TYPES | SERVER_TYPES).items():
        parse = parse_client if name in CLIENT_TYPES else parse_server
        example = next(m for m in EXAMPLES if type(m) is kind)
        whole = json.loads(to_json(example))
        for field in dataclasses.fields(kind):
            part = {key: value for key, value in whole.items() if key != field.name}
            if "None" in str(field.type):
                assert getattr(parse(json.dumps(part)), field.name) is None
                continue
            for wrong in (part, part | {field.name: None}, part | {field.name: [1]}):
                with pytest.raises(WireError, match=f"{name}.{field.name}") as raised:
                    parse(json.dumps(wrong))
                assert raised.value.code == "bad_request"


EXAMPLES: list[Any] = [
    Open("p", 64, 48, 16.5, "live", "png", seed=1, resume="t", received=4, mask=True),
    Prompt("p"),
    Close(),
    InQueue(2, 7.5),
    Opened("s", "t", "m", 12, 9, 64, 48, 0),
    Chunk(1, 9, 12, 50.0, 40.0, 0.5, 4),
    Mask(1, 3, 2, 3, "AA=="),
    PromptApplied("p", 21),
    QualityApplied("size", 21, "416x240", 4),
    Dropped(3, 2),
    Closed(30, "close"),
    Error("at_capacity", "m", 5.0),
]


def test_a_wire_error_crosses_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(WireError("at_capacity", "full", 5.0)))
    assert (error.code, error.message, error.retry_after_s) == ("at_capacity", "full", 5.0)
    assert str(error) == "full"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.text(max_size=200),
        st.builds(
            lambda extra, kind: json.dumps({**OPEN, **extra, "type": kind}),
            st.dictionaries(st.sampled_from([*OPEN, "seed", "resume", "received"]), json_values),
            st.sampled_from(["open", "prompt", "close", "x"]),
        ),
    )
)
def test_any_text_is_a_message_or_a_wire_error(text: str) -> None:
    try:
        message = parse_client(text)
        if isinstance(message, Open):
            Limits().check_open(message)
    except WireError as error:
        to_json(Error(error.code, error.message)).encode()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_frame_or_a_wire_error(data: bytes) -> None:
    try:
        frame = parse_frame(data)
    except WireError:
        assert len(data) <= 16 or any(data[4:8])
    else:
        assert frame.to_bytes() == data
