"""What one client or stranger may cost: decoding, uploads, messages, links, the hub's memory."""

from __future__ import annotations

import asyncio
import io
import json
import socket as socketlib
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from data.video import VideoError
from serve.front.socket import FIRST_SIZE, READ_AHEAD, Socket
from serve.hub.records import Commit, Entry, SessionStore
from serve.ingress import UVICORN
from serve.ingress.backpressure import FlowControl
from serve.limits import Limits
from serve.run import free_port
from serve.settings import ServeSettings
from serve.wire import codec
from serve.wire.link import SECRET_BYTES, Listener
from serve.wire.protocol import WireError
from serve.wire.split_state import SplitState
from tests.serve.conftest import Server, clip, serving
from tests.serve.front.test_http import video
from tests.serve.front.wires import Wire, settle
from tests.serve.hub.test_records import HEADER, progress
from tests.serve.local import local_front
from tests.serve.test_robustness import OPEN

# --- images


def progressive(scans: int) -> bytes:
    """A JPEG of 64x48 whose last scan is repeated."""
    buffer = io.BytesIO()
    Image.fromarray(clip(1, width=64, height=48)[0]).save(buffer, "JPEG", progressive=True)
    image = buffer.getvalue()
    start = image.rindex(codec.SCAN)
    return image[:start] + image[start:-2] * (scans - image.count(codec.SCAN) + 1) + image[-2:]


def test_a_jpeg_goes_over_its_pixels_a_bounded_number_of_times() -> None:
    whole = progressive(codec.MAX_SCANS)
    assert codec.decode(whole, "jpeg", width=64, height=48).shape == (48, 64, 3)
    with pytest.raises(WireError, match="21 scans; at most 20") as raised:
        codec.decode(progressive(21), "jpeg", width=64, height=48)
    assert raised.value.code == "bad_frame"


def test_an_image_that_takes_too_long_ends_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    image = codec.encode(clip(1)[0], "jpeg")
    clock = iter((10.0, 10.0 + codec.MAX_DECODE_S, 20.0, 20.1 + codec.MAX_DECODE_S))
    monkeypatch.setattr(codec.time, "thread_time", lambda: next(clock))
    codec.decode(image, "jpeg", width=48, height=32)
    with pytest.raises(WireError, match=r"took 1\.1 s of CPU; at most 1 s"):
        codec.decode(image, "jpeg", width=48, height=32)


def test_grey_of_16_bits_keeps_its_shades() -> None:
    grey = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    pixels = codec.decode(buffer.getvalue(), "png", width=48, height=32)
    np.testing.assert_array_equal(pixels[..., 1], np.rint(grey / 257))
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_a_turned_jpeg_is_turned_back() -> None:
    """EXIF orientation 6: the camera was held upright, its picture lies on its side."""
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:24] = (255, 0, 0)
    exif = Image.Exif()
    exif[codec.ORIENTATION] = 6
    buffer = io.BytesIO()
    lying = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    lying.save(buffer, "JPEG", exif=exif, quality=95)
    pixels = codec.decode(buffer.getvalue(), "jpeg", width=32, height=48)
    assert np.abs(pixels.astype(int) - upright).mean() < 4
    with pytest.raises(WireError, match="got 32x48"):
        codec.decode(buffer.getvalue(), "jpeg", width=48, height=32)


# --- uploads


def begin_upload(port: int) -> socketlib.socket:
    """An upload of which the first bytes come, and no more."""
    connection = socketlib.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(
        b"POST /v1/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    )
    return connection


def status_of(connection: socketlib.socket) -> int:
    return int(connection.recv(4096).split()[1])


def test_uploads_that_stand_still_are_few_and_end(small_model: Path) -> None:
    limits = Limits(max_uploads=3, upload_idle_s=1.5)
    with serving(small_model, limits) as server, ExitStack() as held:
        still = [held.enter_context(begin_upload(server.port)) for _ in range(3)]
        while server.front.edits.running < 3:
            time.sleep(0.01)
        refused = held.enter_context(begin_upload(server.port))
        assert status_of(refused) == 503
        assert httpx.get(f"{server.http}/healthz").status_code == 200
        assert [status_of(connection) for connection in still] == [408] * 3
        assert server.front.edits.running == 0
        answer = httpx.post(
            f"{server.http}/v1/edits", files={"video": ("v.mp4", video(clip(9)))},
            data={"prompt": "x"}, timeout=60,
        )  # fmt: skip
        assert answer.status_code == 200


def test_an_upload_that_drips_has_an_end(small_model: Path) -> None:
    with (
        serving(small_model, Limits(upload_idle_s=5.0, upload_s=0.4)) as server,
        begin_upload(server.port) as connection,
    ):
        connection.settimeout(0.1)
        began = time.monotonic()
        while time.monotonic() - began < 20:
            try:
                assert status_of(connection) == 408
                return
            except TimeoutError:
                connection.sendall(b"-")
    pytest.fail("it was read on and on")


def test_edits_count_as_sessions_of_their_front(small_model: Path) -> None:
    limits = Limits(max_sessions=1, upload_idle_s=30.0)
    with serving(small_model, limits) as server, begin_upload(server.port) as first:
        while server.front.edits.running < 1:
            time.sleep(0.01)
        refusal = server.call(server.front._full)
        assert refusal.code == "at_capacity"
        with begin_upload(server.port) as second:
            assert status_of(second) == 503
        first.close()
        while server.front.edits.running:
            time.sleep(0.01)
        assert server.call(server.front._full) is None
        server.call(server.front.leave)
        answer = httpx.post(f"{server.http}/v1/edits")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


@pytest.mark.parametrize(
    ("seed", "status"), [("9" * 5000, 400), (str(2**63), 400), (str(2**63 - 1), 200)]
)
def test_a_seed_of_any_length_is_answered(server: Server, seed: str, status: int) -> None:
    answer = httpx.post(
        f"{server.http}/v1/edits", files={"video": ("v.mp4", video(clip(9)))},
        data={"prompt": "x", "seed": seed}, timeout=60,
    )  # fmt: skip
    assert answer.status_code == status


def test_an_error_of_an_upload_names_no_path(server: Server) -> None:
    answer = httpx.post(
        f"{server.http}/v1/edits", files={"video": ("v.mp4", b"no video")}, data={"prompt": "x"}
    )
    message = answer.json()["error"]["message"]
    assert "/" not in message, message


def test_an_upload_whose_reading_fails_is_one_clear_error(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the answer has begun; the frames that were read are being edited meanwhile."""

    def reading(*args: object, **options: object) -> Iterator[tuple[Fraction, np.ndarray]]:
        yield from ((Fraction(n, 16), frame) for n, frame in enumerate(clip(24)))
        raise VideoError("the video is damaged after frame 24")

    monkeypatch.setattr("serve.front.edits.read_timed", reading)
    with pytest.raises(httpx.RemoteProtocolError):  # the answer ends before its end
        httpx.post(
            f"{server.http}/v1/edits", files={"video": ("v.mp4", video(clip(60)))},
            data={"prompt": "x"}, timeout=60,
        )  # fmt: skip
    while server.front.edits.running:
        time.sleep(0.01)
    said = caplog.text + "".join(str(record.exc_info) for record in caplog.records)
    assert "damaged after frame 24" in said
    assert "already running" not in said


# --- messages


@pytest.mark.anyio
@pytest.mark.parametrize(("size", "ahead"), [(2**30, 1), (2**20, 4), (1000, READ_AHEAD)])
async def test_no_more_is_read_ahead_than_the_session_wants(size: int, ahead: int) -> None:
    """One message before it has said so; then by their size, but one of any size."""
    gate = asyncio.Event()

    async def application(connection: Socket) -> None:
        await connection.accept(None)
        await gate.wait()
        await connection.receive()
        await connection.expect(size)
        await asyncio.Event().wait()

    wire = Wire(application)
    wire.incoming.put_nowait({"type": "websocket.connect"})
    for _ in range(100):
        wire.incoming.put_nowait({"type": "websocket.receive", "bytes": b"x"})
    running = asyncio.create_task(wire.run())
    await settle()
    assert wire.read == 1
    gate.set()
    await settle()
    assert wire.read == 1 + ahead
    running.cancel()


@pytest.mark.anyio
async def test_the_ingress_takes_messages_by_what_the_session_needs(small_model: Path) -> None:
    """A socket of the ingress, as `ingress.UVICORN` sets it up, in front of the application."""
    limits = Limits()
    front = await local_front(ServeSettings(str(small_model)))
    config = uvicorn.Config(FlowControl(front.app), port=free_port(), lifespan="off", **UVICORN)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    url = f"ws://127.0.0.1:{config.port}/v1/stream"
    try:
        for size, code in (
            (limits.max_message(48, 32), 1007),
            (limits.max_message(48, 32) + 1, 1009),
        ):
            async with connect(url, subprotocols=[Subprotocol("liveedit.v1")]) as connection:
                await connection.send(json.dumps(OPEN))
                await connection.recv()
                await connection.send(struct.pack("<IIQ", 0, 0, 0) + bytes(size - 16))
                await asyncio.wait_for(connection.wait_closed(), 20)
            assert connection.close_code == code
        # Before it has opened, a client may send what the largest frame of the defaults needs.
        assert limits.max_message(1280, 720) <= FIRST_SIZE < 2 * limits.max_message(1280, 720)
    finally:
        server.should_exit = True
        await serving


# --- links


@pytest.mark.anyio
async def test_of_a_stranger_no_size_is_read() -> None:
    listener = Listener("127.0.0.1", ())
    address = await listener.expect(pytest.fail)
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    text = json.dumps({"stream": "stream", "secret": "x", "sizes": [2**31]}).encode()
    writer.write(struct.pack("<I", len(text)) + text.ljust(SECRET_BYTES))
    assert await asyncio.wait_for(reader.read(1), 2) == b""  # not after the 2 GB, at once
    writer.close()
    listener.close()


# --- the hub's memory


@pytest.mark.anyio
async def test_the_hubs_memory_is_bounded_by_bytes() -> None:
    """Forty-eight frames of 2.8 MB are 133 MB a session: while there is room they are kept."""
    store = SessionStore(max_bytes=100_000)
    tokens = [await store.create(replace(HEADER)) for _ in range(3)]
    size = {tokens[0]: 1000, tokens[1]: 5000, tokens[2]: 100}
    for first in range(0, 48, 12):
        for token in tokens:
            frames = [Entry(n, bytes(size[token])) for n in range(first, first + 12)]
            assert await store.commit(Commit(token, 0, HEADER, progress(first + 12), frames))
            assert store.bytes <= 100_000
            assert store.bytes == sum(record.size for record in store._records.values())
    kept = [store._records[token].tail_start for token in tokens]
    assert kept[0] == kept[2] == 0
    assert kept[1] >= 38  # the largest tail paid
    assert (await store.claim(tokens[0], 0)).epoch == 1


@pytest.mark.anyio
async def test_states_alone_push_out_who_left_first() -> None:
    now = [0.0]
    store = SessionStore(max_bytes=2500, clock=lambda: now[0])
    tokens = []
    for second in range(3):
        now[0] = float(second)
        token = await store.create(HEADER)
        tokens.append(token)
        state = replace(progress(0), state=SplitState(bytes(1000)))
        assert await store.commit(Commit(token, 0, HEADER, state, []))
        await store.release(token, 0, forget=False)
    with pytest.raises(WireError, match="unknown"):
        await store.claim(tokens[0], 0)
    assert store.bytes == 2000
    await store.claim(tokens[2], 0)


@pytest.mark.anyio
async def test_who_keeps_most_gives_way_to_other_tenants() -> None:
    """Many small sessions of one, in both forms, leave another's large one as it was."""
    store = SessionStore(max_bytes=100_000)

    async def kept(tenant: str, size: int) -> str:
        opening = replace(HEADER.opening, tenant=tenant)
        header = replace(HEADER, opening=opening)
        token = await store.create(header)
        state = replace(progress(12), state=SplitState(bytes(500)))
        frames = [Entry(n, bytes(size)) for n in range(12)]
        assert await store.commit(Commit(token, 0, header, state, frames))
        return token

    modest = await kept("modest", 3000)
    for size, still in ((1000, 12), (0, 12)):
        for _ in range(200):
            await kept("greedy", size)
        assert store.bytes <= 100_000
        assert len((await store.claim(modest, 0)).tail) == still
    assert store._of_tenants == {"modest": 36_500, "greedy": store.bytes - 36_500}
    for token, record in list(store._records.items()):
        if token != modest:
            await store.release(token, record.epoch, forget=True)
    assert store._of_tenants == {"modest": store.bytes} == {"modest": 36_500}
    for _ in range(2):  # and one above its share is cut when others want theirs
        await kept("modest", 3000)
    await kept("third", 2000)
    assert store._of_tenants["third"] == 24_500
