"""The client against a server that does as it is told: what it says, hears and refuses."""

from __future__ import annotations

import asyncio

import pytest

from serve.client import WireError
from serve.wire.protocol import Closed
from tests.serve.client.scripted import Peer, collect, opening, send, server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("hurry")]


async def test_it_opens_as_it_was_asked_to() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.finish(0)

    async with server(script) as (url, (peers)):
        async with opening(url, mode="live", seed=0, mask=True, token="secret") as stream:
            assert stream.opened is not None
            assert stream.opened.resume == "token-0"
            stream.finish()
            assert await collect(stream) == []
            assert stream.closed == Closed(0, "close")
        (peer,) = peers
        assert peer.open == {
            "type": "open", "prompt": "red", "width": 6, "height": 4, "fps": 8, "mode": "live",
            "format": "rgb24", "seed": 0, "mask": True,
        }  # fmt: skip
        assert peer.socket.request is not None
        assert peer.socket.request.path == "/v1/stream"
        assert peer.socket.request.headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("code", ["bad_request", "bad_frame", "unauthorized", "too_slow"])
async def test_other_errors_end_it(code: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.error(code)

    async with server(script) as (url, peers), opening(url) as stream:
        with pytest.raises(WireError, match="as told") as raised:
            await collect(stream)
        assert (raised.value.code, raised.value.retry_after_s) == (code, 2.0)
        with pytest.raises(WireError):
            await send(stream, 1)
        assert len(peers) == 1


@pytest.mark.parametrize(
    ("code", "again"), [("draining", True), ("at_capacity", False), ("internal", False)]
)
async def test_a_first_refusal_is_final_unless_the_server_goes_away(code: str, again: bool) -> None:
    async def refuse(peer: Peer) -> None:
        await peer.error(code, 1013)

    async def take(peer: Peer) -> None:
        assert "resume" not in peer.open
        await peer.greet()
        await peer.finish(0)

    async with server(refuse, take) as (url, _):
        if again:
            async with opening(url) as stream:
                stream.finish()
                assert await collect(stream) == []
                assert stream.reconnects == 0
        else:
            with pytest.raises(WireError) as raised:
                async with opening(url):
                    pass
            assert raised.value.code == code


async def test_lossless_waits_while_enough_is_on_its_way() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await go_on.wait()
        await peer.edited(0)
        await peer.finish(1)

    async with server(script) as (url, _), opening(url) as stream:
        sending = asyncio.create_task(send(stream, 100))
        await asyncio.sleep(0.1)
        assert stream._next == 6  # three chunks of two frames
        go_on.set()
        await asyncio.sleep(0.1)
        assert stream._next == 7
        sending.cancel()
        stream.finish()
        assert await collect(stream) == [0]


@pytest.mark.parametrize("wrong", [(0, 0), (1, 0)])
async def test_frames_out_of_order_are_the_servers_fault(wrong: tuple[int, int]) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.edited(*wrong)
        await peer.socket.wait_closed()

    async def never(peer: Peer) -> None:
        await peer.error("bad_request")

    async with server(script, never) as (url, _), opening(url) as stream:
        with pytest.raises(WireError):
            await collect(stream)
        assert stream.received == 1


@pytest.mark.parametrize("answer", ["frame", "chunk", "unknown"])
async def test_only_opened_answers_open(answer: str) -> None:
    async def script(peer: Peer) -> None:
        if answer == "frame":
            await peer.edited(0)
        elif answer == "chunk":
            await peer.say(type="dropped", first_frame=0, frames=1)
        else:
            await peer.say(type="weather")
        await peer.socket.wait_closed()

    async with server(script) as (url, _):
        with pytest.raises(WireError) as raised:
            async with opening(url):
                pass
        assert raised.value.code == "bad_request"


async def test_a_frame_may_be_larger_than_usual_messages() -> None:
    """A raw one of 1280x720 has 2.8 MB; beyond what any session has the connection is over."""
    large = 3 * 1280 * 720

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.socket.send(bytes(16) + bytes(large))
        await peer.finish(1)

    async with server(script) as (url, _), opening(url) as stream:
        stream.finish()
        assert [len(frame.image) async for frame in stream] == [large]
        assert stream.reconnects == 0
