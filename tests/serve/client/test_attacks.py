"""What each attack says, how often and by how many at once, to a server that only listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from serve.client import attacks
from serve.client.attacks import ATTACKS, BOMB, LARGE, LARGE_BOMB
from serve.client.floods import FLOODS

pytestmark = pytest.mark.anyio

WIDTH, HEIGHT = 48, 32
USUAL = {"prompt": "x", "width": WIDTH, "height": HEIGHT, "mode": "lossless", "format": "jpeg"}
# Connections at once, and what the first of them opens with beside what is usual.
OPENS: dict[str, tuple[int, dict[str, Any]]] = {
    "scan-bomb": (1, {"width": LARGE[0], "height": LARGE[1], "fps": 16.0, "work_size": "96x64"}),
    "large-scan-bomb": (
        1, {"width": LARGE[0], "height": LARGE[1], "fps": 16.0, "work_size": "96x64"},
    ),
    "false-fps": (1, {"fps": 1.0}),
    "prompt-flood": (1, {"fps": 16.0}),
    "prompt-switch": (1, {"fps": 16.0}),
    "open-close": (8, {"fps": 16.0}),
    "leave-queue": (32, {"fps": 16.0, "queue": True}),
    "wrong-resume": (16, {"fps": 16.0, "resume": "0" * 32}),
}  # fmt: skip


class Listening:
    """A server that answers an open when `answers` is set, and notes what it hears after it, where
    it `cuts` for one message of each connection."""

    def __init__(self) -> None:
        self.cuts = False
        self.opens: list[dict[str, Any]] = []
        self.heard: list[Any] = []
        self.tokens: set[str | None] = set()
        self.ends: set[int | None] = set()  # close codes
        self.answers = asyncio.Event()

    async def handle(self, socket: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed), self.ending(socket):
            opened = json.loads(await socket.recv())
            self.opens.append(opened)
            assert socket.request is not None
            self.tokens.add(socket.request.headers.get("Authorization"))
            await self.answers.wait()
            await socket.send(json.dumps({
                "type": "opened", "session": "s", "resume": "t", "model": "m", "chunk_frames": 12,
                "first_chunk_frames": 9, "width": opened["width"], "height": opened["height"],
                "next_frame": 0,
            }))  # fmt: skip
            async for data in socket:
                self.heard.append(data)
                if self.cuts:
                    socket.transport.abort()

    @contextlib.contextmanager
    def ending(self, socket: ServerConnection) -> Iterator[None]:
        try:
            yield
        finally:
            self.ends.add(socket.close_code)

    async def until(self, opens: int, heard: int = 0) -> None:
        async with asyncio.timeout(30):
            while len(self.opens) < opens or len(self.heard) < heard:
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def attacked(name: str) -> AsyncIterator[Listening]:
    listening = Listening()
    async with serve(
        listening.handle, "127.0.0.1", 0, subprotocols=[Subprotocol("liveedit.v1")],
        compression=None, max_size=2**24,
    ) as server:  # fmt: skip
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        attack = asyncio.ensure_future(ATTACKS[name](url, WIDTH, HEIGHT, "secret"))
        try:
            yield listening
            assert not attack.done(), attack.exception()
        finally:
            listening.answers.set()  # the server waits for its handlers
            attack.cancel()
            await asyncio.gather(attack, return_exceptions=True)


def test_every_attack_is_asked() -> None:
    assert OPENS.keys() | FLOODS.keys() | {"slow-upload"} == ATTACKS.keys()


@pytest.mark.parametrize("name", OPENS)
async def test_an_attack_opens_as_it_says_by_so_many_at_once(name: str) -> None:
    many, asked = OPENS[name]
    async with attacked(name) as listening:
        await listening.until(many)
        await asyncio.sleep(0.05)
        assert len(listening.opens) == many  # nobody opens twice before it was answered
        for opened in listening.opens:
            found = {k: v for k, v in opened.items() if k != "type"}
            assert found == {**USUAL, **asked}
        assert listening.tokens == {"Bearer secret"}
        if name in ("scan-bomb", "large-scan-bomb", "open-close", "leave-queue", "wrong-resume"):
            listening.answers.set()
            await listening.until(many + 3)  # each begins again
            async with asyncio.timeout(30):
                while not listening.ends:
                    await asyncio.sleep(0.002)
            # Without a word, or as a client does that has seen enough.
            assert listening.ends == {1006 if name == "leave-queue" else 1000}
        if name == "wrong-resume":
            numbers = [int(opened["resume"], 16) for opened in listening.opens]
            assert max(numbers) > 0
            assert all(re.fullmatch("[0-9a-f]{32}", o["resume"]) for o in listening.opens)


@pytest.mark.parametrize(("name", "size"), [("scan-bomb", BOMB), ("large-scan-bomb", LARGE_BOMB)])
async def test_a_bomb_is_sent_as_the_first_frame(name: str, size: int) -> None:
    async with attacked(name) as listening:
        listening.answers.set()
        await listening.until(1, heard=1)
        bomb = listening.heard[0]
        assert bomb[:16] == bytes(16)
        assert 0.9 * size < len(bomb) - 16 <= size


async def test_instructions_come_without_end_and_each_is_another() -> None:
    async with attacked("prompt-flood") as listening:
        listening.answers.set()
        await listening.until(1, heard=50)
        assert {json.loads(said)["prompt"] for said in listening.heard} == {"x" * 1900}
    async with attacked("prompt-switch") as listening:
        listening.answers.set()
        await listening.until(1, heard=6)
        texts = [json.loads(said) for said in listening.heard if isinstance(said, str)]
        assert [text["prompt"] for text in texts[:3]] == [f"make it 0 {n}" for n in range(3)]
        assert any(isinstance(said, bytes) for said in listening.heard)


async def test_a_flood_that_is_cut_off_goes_on() -> None:
    async with attacked("prompt-flood") as listening:
        listening.cuts = True
        listening.answers.set()
        await listening.until(3)


async def test_uploads_begin_side_by_side_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "UPLOADS", 5)
    heads: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"--b\r\n"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                heads.append(await reader.read(1))  # nothing comes
        await asyncio.Event().wait()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    attack = asyncio.ensure_future(ATTACKS["slow-upload"](url, WIDTH, HEIGHT, "secret"))
    async with asyncio.timeout(30):
        while len(heads) < 5:
            await asyncio.sleep(0.002)
    await asyncio.sleep(0.15)
    attack.cancel()
    server.close()
    assert len(heads) == 5
    for head in heads:
        assert head.startswith(b"POST /v1/edits HTTP/1.1\r\n")
        assert b"\r\nAuthorization: Bearer secret\r\n" in head
        assert b"\r\nContent-Length: 1000000\r\n" in head
