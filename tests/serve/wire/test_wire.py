"""A client written from the design page alone: plain WebSocket, JSON and struct."""

from __future__ import annotations

import io
import itertools
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from pipelines.commands.measure.trace import read_ways
from serve.admission.admission import Sizes
from serve.admission.ladder import Calm
from serve.limits import Limits
from tests.serve.conftest import Server, clip, serving
from tests.serve.tokens import write_tokens

WAY = [  # of a chunk, in its trace
    "front.receive", "codec.decode", "front.wait", "link.out", "editor.queue", "editor.device",
    "editor.state", "link.back", "front.queue", "codec.encode", "hub.commit", "front.send",
    "front.pace",
]  # fmt: skip

OPEN: dict[str, Any] = {
    "type": "open", "prompt": "make it red", "width": 48, "height": 32, "fps": 16,
    "mode": "lossless", "format": "jpeg", "seed": 1,
}  # fmt: skip


@contextmanager
def socket(server: Server, *, query: str = "", **options: Any) -> Iterator[ClientConnection]:
    with connect(
        f"{server.url}/v1/stream{query}",
        subprotocols=options.pop("subprotocols", ["liveedit.v1"]),
        compression=None,
        open_timeout=60,
        **options,
    ) as connection:
        yield connection


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def binary(index: int, image: bytes, time_us: int = 0) -> bytes:
    return struct.pack("<IIQ", index, 0, time_us) + image


def say(connection: ClientConnection, **message: Any) -> None:
    connection.send(json.dumps(message))


def hear(connection: ClientConnection) -> dict[str, Any]:
    data = connection.recv(timeout=60)
    assert isinstance(data, str), "a frame came where a message was expected"
    return json.loads(data)


def hear_all(connection: ClientConnection) -> list[Any]:
    """Everything up to the close: dicts, and (index, time_us, picture) for frames."""
    out: list[Any] = []
    while True:
        try:
            data = connection.recv(timeout=60)
        except ConnectionClosed as closed:
            return [*out, closed.rcvd.code if closed.rcvd else None]
        if isinstance(data, str):
            out.append(json.loads(data))
        else:
            index, flags, time_us = struct.unpack_from("<IIQ", data)
            assert flags == 0
            out.append((index, time_us, Image.open(io.BytesIO(data[16:]))))


def test_a_session_to_the_letter(server: Server) -> None:
    with socket(server) as connection:
        assert connection.subprotocol == "liveedit.v1"
        assert connection.protocol.extensions == []
        connection.send(json.dumps(OPEN))
        opened = hear(connection)
        assert set(opened) == {
            "type", "session", "resume", "model", "chunk_frames", "first_chunk_frames",
            "width", "height", "next_frame", "work_size", "detail",
        }  # fmt: skip
        assert (opened["work_size"], opened["detail"]) == ("48x32", "source")
        assert opened["type"] == "opened"
        assert opened["model"] == "small"
        numbers = ("chunk_frames", "first_chunk_frames", "width", "height", "next_frame")
        assert [opened[name] for name in numbers] == [12, 9, 48, 32, 0]
        frames = clip(25)
        for n in range(9):
            connection.send(binary(n, jpeg(frames[n]), 1_000_000 + n))
        say(connection, type="prompt", prompt="make it snow")
        for n in range(9, 25):
            connection.send(binary(n, jpeg(frames[n]), 1_000_000 + n))
        say(connection, type="close")
        heard = hear_all(connection)
    pictures = [item for item in heard if isinstance(item, tuple)]
    assert [(index, time_us) for index, time_us, _ in pictures] == [
        (n, 1_000_000 + n) for n in range(25)
    ]
    assert {(p.format, p.size) for _, _, p in pictures} == {("JPEG", (48, 32))}
    messages = [item for item in heard if isinstance(item, dict)]
    kinds = [message["type"] for message in messages]
    assert kinds == ["chunk", "prompt_applied", "chunk", "chunk", "closed"]
    chunks = [message for message in messages if message["type"] == "chunk"]
    assert [(c["index"], c["first_frame"], c["frames"]) for c in chunks] == [
        (0, 0, 9), (1, 9, 12), (2, 21, 4),
    ]  # fmt: skip
    for chunk in chunks:
        assert set(chunk) == {
            "type", "index", "first_frame", "frames", "latency_ms", "compute_ms", "recomputed",
            "steps",
        }  # fmt: skip
        assert 0 < chunk["recomputed"] <= 1
        assert chunk["steps"] == 4
    assert messages[1] == {
        "type": "prompt_applied", "prompt": "make it snow", "first_frame": 9, "unknown": "snow",
    }  # fmt: skip
    assert messages[-1] == {"type": "closed", "frames": 25, "reason": "close"}
    assert heard[-2:] == [messages[-1], 1000]
    # A chunk's message comes after its last frame.
    assert heard.index(chunks[0]) == 9


def test_closing_at_once(server: Server) -> None:
    with socket(server) as connection:
        connection.send(json.dumps(OPEN))
        hear(connection)
        say(connection, type="close")
        assert hear_all(connection) == [{"type": "closed", "frames": 0, "reason": "close"}, 1000]


def test_compression_is_not_negotiated_even_if_offered(server: Server) -> None:
    url = f"{server.url}/v1/stream"
    with connect(url, subprotocols=["liveedit.v1"], compression="deflate") as connection:
        assert connection.protocol.extensions == []


def test_resuming_by_hand(server: Server) -> None:
    frames = clip(33)
    got: list[int] = []
    with socket(server) as connection:
        connection.send(json.dumps(OPEN))
        token = hear(connection)["resume"]
        for n in range(21):
            connection.send(binary(n, jpeg(frames[n])))
        while len(got) < 13:
            data = connection.recv(timeout=60)
            if isinstance(data, bytes):
                got.append(struct.unpack_from("<I", data)[0])
        connection.socket.close()
    with socket(server) as connection:
        connection.send(json.dumps(OPEN | {"resume": token, "received": len(got)}))
        opened = hear(connection)
        assert opened["resume"] == token
        assert opened["next_frame"] in (9, 21)
        for n in range(opened["next_frame"], 33):
            connection.send(binary(n, jpeg(frames[n])))
        say(connection, type="close")
        heard = hear_all(connection)
    got += [item[0] for item in heard if isinstance(item, tuple)]
    assert got == list(range(33))
    assert heard[-2]["frames"] == 33


@pytest.mark.parametrize(
    ("first", "code", "close"),
    [
        ("hello", "bad_request", 1008),
        (b"\x00" * 40, "bad_request", 1008),
        ('{"type":"close"}', "bad_request", 1008),
        (json.dumps(OPEN | {"width": 100_000}), "unsupported_size", 1008),
        (json.dumps(OPEN | {"fps": -1}), "bad_request", 1008),
        (json.dumps(OPEN | {"resume": "unknown", "received": 0}), "bad_request", 1008),
    ],
)
def test_a_wrong_first_message(server: Server, first: str, code: str, close: int) -> None:
    with socket(server) as connection:
        connection.send(first)
        error, closed = hear_all(connection)
    assert (error["type"], error["code"], closed) == ("error", code, close)
    assert error["message"]


@pytest.mark.parametrize(
    ("message", "code", "close"),
    [
        (binary(1, b"image"), "bad_frame", 1007),
        (binary(0, b"image"), "bad_frame", 1007),
        (b"short", "bad_frame", 1007),
        (binary(0, bytes(100_000)), "bad_frame", 1007),
        (json.dumps(OPEN), "bad_request", 1008),
        ('{"type":"prompt","prompt":""}', "bad_request", 1008),
    ],
)
def test_a_wrong_message_ends_the_session(
    server: Server, message: str, code: str, close: int
) -> None:
    with socket(server) as connection:
        connection.send(json.dumps(OPEN))
        hear(connection)
        connection.send(message)
        error, closed = hear_all(connection)
    assert (error["code"], closed) == (code, close)


def test_the_subprotocol_must_be_offered(server: Server) -> None:
    with socket(server, subprotocols=None) as connection:
        error, closed = hear_all(connection)
    assert (error["code"], closed) == ("bad_request", 1008)
    assert "liveedit.v1" in error["message"]


def test_silence_is_no_open(small_model: Path) -> None:
    limits = Limits(open_timeout_s=0.5)
    with serving(small_model, limits) as server, socket(server) as connection:
        error, _ = hear_all(connection)
    assert "no open message within 0.5 s" in error["message"]


def test_full_is_an_accepted_socket_an_error_and_1013(small_model: Any) -> None:
    with serving(small_model, max_sessions=1) as full, socket(full) as first:
        first.send(json.dumps(OPEN))
        hear(first)
        with socket(full) as second:
            second.send(json.dumps(OPEN))
            error, closed = hear_all(second)
        assert (error["code"], closed) == ("at_capacity", 1013)
        assert error["retry_after_s"] > 0
        say(first, type="close")
        assert hear_all(first)[-1] == 1000
        with socket(full) as third:
            third.send(json.dumps(OPEN))
            assert hear(third)["type"] == "opened"


def test_a_full_server_edits_less_well_says_so_and_goes_up_again(
    small_model: Any,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks are thought to cost what they last; they cost much less, as is seen by and by. And
    each leaves a trace."""
    own = Sizes((32, 48), (32, 48), model=str(small_model))
    mask, steps = replace(own, sparing=True), replace(own, sparing=True, halved=True)
    told: list[dict[str, Any]] = []
    indices = itertools.count()
    monkeypatch.setattr("serve.editor.capacity.NEWEST", 0.4)  # soon: each lasts half a second
    monkeypatch.setattr("serve.admission.ladder.UP_S", 0.1)  # which a calm without a rise has
    with (
        caplog.at_level("INFO", "serve"),
        serving(small_model, measured_capacity=True, traces=str(tmp_path)) as busy,
    ):
        capacity = busy.engine.capacity
        observe = capacity.observe
        capacity.observe = lambda *seen: observe(seen[0], min(seen[1], 0.1), *seen[2:])  # not busy
        capacity.costs[own], capacity._calm = 0.43, Calm(up_s=0.1)
        capacity.warm = {own: 1.0, mask: 1.0, steps: 0.7}
        with socket(busy) as connection:
            connection.send(json.dumps(OPEN | {"mode": "live", "fps": 24}))
            assert hear(connection)["type"] == "opened"
            for count in [9] + [12] * 39:
                for frame in clip(count):
                    connection.send(binary(next(indices), jpeg(frame)))
                while (item := connection.recv(timeout=60)) is not None:
                    message = json.loads(item) if isinstance(item, str) else {}
                    if message.get("type") == "quality":
                        told.append(message)
                    if message.get("type") == "chunk":
                        break
                if len(told) > 1:
                    break
            say(connection, type="close")
            assert hear_all(connection)[-1] == 1000
        busy.front.services.tracer.span_processor.force_flush()  # type: ignore[union-attr]
    first, second = told
    lower = {"type": "quality", "level": "steps", "first_frame": 0, "work_size": "48x32"}
    assert first == lower | {"steps": 2}
    assert second == lower | {"steps": 4, "level": "full", "first_frame": second["first_frame"]}
    (ended,) = [record for record in caplog.records if getattr(record, "event", "") == "ended"]
    lowered = 1 + (second["first_frame"] - 9) // 12
    assert ended.quality == f"1 on full, {lowered} on steps of {lowered + 1} chunks"
    assert ended.getMessage().endswith(f"; edited {ended.quality}")
    ways = read_ways(tmp_path)
    assert [way.about["rung"] for way in ways] == ["steps"] * lowered + ["full"]
    assert [way.about["chunk"] for way in ways] == list(range(lowered + 1))
    for way in ways:
        steps = sorted(way.spans, key=lambda span: (span.began, span.ended))
        assert [step.name for step in steps[1:]] == WAY[1:]
        for before, after in pairwise(steps):  # nothing is counted twice, or not at all
            assert after.began == pytest.approx(before.ended, abs=2e-3)
        device = next(step for step in steps if step.name == "editor.device")
        assert 0 < device.ms < way.latency_ms


def test_masks_come_to_those_who_ask(server: Server) -> None:
    with socket(server) as connection:
        connection.send(json.dumps(OPEN | {"mask": True}))
        hear(connection)
        for n in range(9):
            connection.send(binary(n, jpeg(clip(9)[n])))
        say(connection, type="close")
        messages = [item for item in hear_all(connection) if isinstance(item, dict)]
    assert [message["type"] for message in messages] == ["mask", "chunk", "closed"]
    assert [messages[0][name] for name in ("index", "latents", "rows", "columns")] == [0, 3, 2, 3]


def test_tokens(small_model: Any, tmp_path: Any) -> None:
    tokens = write_tokens(tmp_path / "tokens", {"a": "secret-one", "b": "secret-two"})
    with serving(small_model, token_file=str(tokens)) as guarded:
        for options in (
            {},
            {"query": "?token=wrong"},
            {"additional_headers": {"Authorization": "Bearer x"}},
        ):
            with socket(guarded, **options) as connection:
                error, closed = hear_all(connection)
            assert (error["code"], closed) == ("unauthorized", 1008)
        for options in (
            {"query": "?token=secret-two"},
            {"additional_headers": {"Authorization": "Bearer secret-one"}},
        ):
            with socket(guarded, **options) as connection:
                connection.send(json.dumps(OPEN))
                assert hear(connection)["type"] == "opened"
