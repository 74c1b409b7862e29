"""Where a server is looked for, who is asked again, and what it says of its model by plain HTTP."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosedError, InvalidMessage, InvalidStatus
from websockets.http11 import Response

from infra.runtime.errors import UserError
from serve.client import ConnectError, WireError, api, connect, edit_frames, served_model
from serve.client.stream import _cut_by_a_server, stream_url
from serve.wire.protocol import Closed, Opened
from tests.serve.client.scripted import PICTURE, Peer, server

MODEL = {"name": "m", "width": 48}


@dataclass
class Web:
    """Answers every request in the same way, and remembers them."""

    address: str = ""
    status: int = 200
    body: str = json.dumps({"models": [MODEL]})
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and token


@pytest.fixture(scope="module")
def listening() -> Iterator[tuple[Web, int]]:
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(web.status)
            self.end_headers()
            self.wfile.write(web.body.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield web, server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def web(listening: tuple[Web, int]) -> Web:
    web, port = listening
    web.__init__(f"127.0.0.1:{port}")  # type: ignore[misc]
    return web


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("ws://{}", "/v1/models"),
        ("http://{}/", "/v1/models"),
        ("ws://{}/v1/stream", "/v1/models"),
        ("http://{}/team/live", "/team/live/v1/models"),  # of a proxy in front of it
        ("ws://{}/team/live/v1/stream", "/team/live/v1/models"),
    ],
)
def test_it_is_asked_where_its_streams_are(web: Web, url: str, path: str) -> None:
    assert served_model(url.format(web.address)) == MODEL
    assert served_model(url.format(web.address), token="secret") == MODEL
    assert web.asked == [(path, None), (path, "Bearer secret")]


def test_a_refusal_is_the_server_s_own(web: Web) -> None:
    web.status = 401
    web.body = json.dumps({"error": {"code": "unauthorized", "message": "send a token"}})
    with pytest.raises(WireError, match="send a token") as raised:
        served_model(f"ws://{web.address}")
    assert raised.value.code == "unauthorized"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, "<html>"),
        (404, "[]"),
        (500, '{"error": "text"}'),
        (500, "{}"),
        (200, "<html>"),
        (200, "{}"),
        (200, '{"models": []}'),
    ],
)
def test_what_is_no_liveedit_server_is_said(web: Web, status: int, body: str) -> None:
    web.status, web.body = status, body
    with pytest.raises(ConnectError, match="is it a LiveEdit server"):
        served_model(f"ws://{web.address}")


def test_of_several_models_the_first_is_told_of_that_has_the_name(web: Web) -> None:
    models = [{"name": name, "model": name[0]} for name in ("a 1", "b 4", "b 7", "a 2")]
    web.body = json.dumps({"models": models})
    for asked, name in ((None, "a 1"), ("a", "a 1"), ("b", "b 4")):
        assert served_model(f"ws://{web.address}", asked)["name"] == name
    with pytest.raises(WireError, match=r"no model 'c' is served; choose a, b$"):
        served_model(f"ws://{web.address}", "c")


def test_who_listens_and_says_nothing_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "ANSWER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        ended = threading.Timer(20, silent.shutdown, [socket.SHUT_RDWR])  # or all would wait
        ended.start()
        with pytest.raises(ConnectError, match="gives no answer: timed out"):
            served_model(f"ws://127.0.0.1:{port}")
        ended.cancel()


def refused(status: int) -> InvalidStatus:
    return InvalidStatus(Response(status, "", Headers()))


def garbled(cause: Exception) -> InvalidMessage:
    error = InvalidMessage("no HTTP")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (refused(500), True),  # a proxy whose server starts
        (refused(503), True),
        (refused(499), False),
        (refused(404), False),  # no LiveEdit server
        (garbled(EOFError()), True),
        (garbled(ValueError()), False),
        (ConnectionClosedError(None, None), True),
        (TimeoutError(), True),
        (ConnectionRefusedError(), False),  # nobody is there
    ],
)
def test_who_is_asked_again_for_a_first_connection(error: Exception, again: bool) -> None:
    assert _cut_by_a_server(error) is again


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ws://h:1", "ws://h:1/v1/stream"),
        ("ws://h:1/", "ws://h:1/v1/stream"),
        ("http://h", "ws://h/v1/stream"),
        ("https://h?token=t", "wss://h/v1/stream?token=t"),
        ("wss://h/other", "wss://h/other/v1/stream"),
        ("ws://h/v1/stream#x", "ws://h/v1/stream"),
        ("wss://h/a/b/v1/stream/?token=x", "wss://h/a/b/v1/stream?token=x"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert stream_url(url) == address


@pytest.mark.parametrize("url", ["h:1", "ftp://h", "ws://", "", "/v1/stream"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match="write ws://HOST:PORT"):
        stream_url(url)


@pytest.mark.anyio
async def test_all_that_a_plain_caller_asks_for_arrives_and_comes_back() -> None:
    asked = {
        "fps": 8.0, "format": "rgb24", "seed": 3, "work_size": "native", "detail": "off",
        "model": "m",
    }  # fmt: skip
    heard: list[Any] = []
    options = {**asked, "token": "secret", "on_event": heard.append}
    assert options.keys() == inspect.signature(edit_frames).parameters.keys() - {
        "url", "frames", "prompt",
    }  # fmt: skip

    async def script(peer: Peer) -> None:
        await peer.greet()
        assert [await peer.hear() for _ in range(3)] == [0, 1, 2]
        await peer.edited(0, 1, 2)
        await peer.finish(3)

    frames = [PICTURE + np.uint8(n) for n in range(3)]
    async with server(script) as (url, peers):
        edited = await asyncio.to_thread(lambda: list(edit_frames(url, frames, "red", **options)))  # type: ignore[arg-type]
        assert np.array_equal(edited, frames)
        (peer,) = peers
        assert peer.open == {
            "type": "open", "prompt": "red", "width": 6, "height": 4, "mode": "lossless", **asked,
        }  # fmt: skip
        assert peer.socket.request is not None
        assert peer.socket.request.headers["Authorization"] == "Bearer secret"
        first, *_, last = heard
        assert (type(first), last) == (Opened, Closed(3, "close"))
        assert await asyncio.to_thread(lambda: list(edit_frames(url, [], "red", fps=8))) == []
        assert len(peers) == 1


@pytest.mark.anyio
async def test_all_that_a_caller_asks_for_is_opened_with() -> None:
    asked = {
        "width": 6, "height": 4, "fps": 8.0, "format": "rgb24", "seed": 3, "work_size": "native",
        "detail": "off", "model": "m", "mode": "live", "mask": True,
    }  # fmt: skip
    options = {**asked, "token": "secret", "on_queue": lambda place: None}
    names = inspect.signature(connect).parameters.keys()
    assert options.keys() == names - {"url", "prompt"}

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.finish(0)

    async with server(script) as (url, peers):
        for given, said in ((options, {**asked, "queue": True}), ({**asked, "mask": False}, asked)):
            async with connect(url, "red", **given) as stream:  # type: ignore[arg-type]
                stream.finish()
                assert [event async for event in stream] == []
            wanted = {"type": "open", "prompt": "red", **said}
            if not given["mask"]:
                del wanted["mask"]
            assert peers[-1].open == wanted
            assert peers[-1].socket.request is not None
            header = peers[-1].socket.request.headers.get("Authorization")
            assert header == ("Bearer secret" if "token" in given else None)


@pytest.mark.anyio
async def test_an_error_does_not_wait_for_a_source_that_stands_still() -> None:
    """A camera that gives no frame, say."""
    still, over = threading.Event(), threading.Event()
    in_time: list[bool] = []

    def camera() -> Iterator[np.ndarray]:
        yield PICTURE
        still.set()
        in_time.append(over.wait(10))

    async def script(peer: Peer) -> None:
        await peer.greet()
        assert await peer.hear() == 0
        while not still.is_set():
            await asyncio.sleep(0.001)
        await peer.error("too_slow")

    def edit() -> None:
        try:
            list(edit_frames(url, camera(), "red", fps=8, format="rgb24"))
        finally:
            over.set()

    async with server(script) as (url, _):
        with pytest.raises(WireError, match="as told"):
            await asyncio.to_thread(edit)
    async with asyncio.timeout(20):
        while not in_time:
            await asyncio.sleep(0.001)
    assert in_time == [True]
