"""A client that comes back while its old socket still looks alive: from Wi-Fi to LTE."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from serve.front.front import Front
from serve.hub.records import SessionStore
from tests.serve.conftest import Server, serving
from tests.serve.hub.test_records import HEADER
from tests.serve.test_robustness import IMAGE, OPEN


@pytest.fixture(scope="module")
def narrow(small_model: Path) -> Iterator[Server]:
    with serving(small_model, max_sessions=1) as running:
        yield running


@pytest.fixture
def full(narrow: Server) -> Server:
    """A server with room for one session, which nobody has."""
    deadline = time.monotonic() + 20
    while narrow.engine.capacity.loads:  # of the test before
        assert time.monotonic() < deadline, "a session keeps its place"
        time.sleep(0.005)
    return narrow


def socket(server: Server) -> ClientConnection:
    return connect(f"{server.url}/v1/stream", subprotocols=["liveedit.v1"], compression=None)  # type: ignore[list-item]


def opened(connection: ClientConnection, **message: Any) -> dict[str, Any]:
    connection.send(json.dumps(OPEN | message))
    answer: dict[str, Any] = json.loads(connection.recv(timeout=60))
    return answer


def first_chunk(connection: ClientConnection, first: int = 0, count: int = 9) -> list[int]:
    """Sends a chunk's frames; returns the indices that come back."""
    for n in range(first, first + count):
        connection.send(struct.pack("<IIQ", n, 0, 0) + IMAGE)
    indices: list[int] = []
    while len(indices) < count:
        if isinstance(data := connection.recv(timeout=60), bytes):
            indices.append(struct.unpack_from("<I", data)[0])
    return indices


def test_a_session_takes_the_place_of_its_own_ghost(full: Server) -> None:
    with socket(full) as old, socket(full) as new:
        token = opened(old)["resume"]
        assert first_chunk(old) == list(range(9))
        back = opened(new, resume=token, received=9)
        assert (back["type"], back["next_frame"]) == ("opened", 9)
        assert first_chunk(new, 9, 12) == list(range(9, 21))
        heard = [json.loads(message)["type"] for message in old]
        assert heard == ["chunk"]  # of its first; it was ended, and that is no error
        assert old.close_code == 1001
        engine = full.engine
        assert len(engine.capacity.loads) == 1


@pytest.mark.parametrize("again", ["1/2", "32x16", "native", None])
def test_a_session_is_resumed_with_the_work_size_that_it_was_opened_with(
    full: Server, again: str | None
) -> None:
    """In the words of its first open, in those of the answer, or in none; "native" may mean
    another size by now."""
    with socket(full) as old, socket(full) as new:
        first = opened(old, work_size="1/2")
        assert first["work_size"] == "32x16"
        first_chunk(old)
        words = {} if again is None else {"work_size": again}
        back = opened(new, resume=first["resume"], received=9, **words)
        assert (back["type"], back["work_size"]) == ("opened", "32x16")


@pytest.mark.anyio
async def test_a_beat_lets_go_of_the_old_socket_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front that holds the same token twice, once with an epoch that is over."""
    monkeypatch.setattr("serve.front.front.HOLDER_BEAT_S", 0.01)
    store = SessionStore()
    token = await store.create(HEADER)
    assert (await store.claim(token, 0)).epoch == 1
    ended: list[int] = []

    class Holder:
        def __init__(self, epoch: int) -> None:
            self.held = (token, epoch)

        def supersede(self) -> None:
            ended.append(self.held[1])

    front = SimpleNamespace(
        connections={Holder(0), Holder(1)}, services=SimpleNamespace(store=store)
    )
    beating = asyncio.create_task(Front._beat(front))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    beating.cancel()
    assert set(ended) == {0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 64),
        ("height", 48),
        ("mode", "live"),
        ("format", "png"),
        ("work_size", "1/2"),
        ("detail", "off"),
    ],
)
def test_a_resume_of_another_shape_leaves_the_holder_alone(
    full: Server, name: str, value: object
) -> None:
    with socket(full) as holder, socket(full) as other:
        token = opened(holder)["resume"]
        first_chunk(holder)
        error = opened(other, resume=token, received=9, **{name: value})
        assert (error["type"], error["code"]) == ("error", "bad_request")
        assert f"has {name} " in error["message"]
        assert first_chunk(holder, 9, 12) == list(range(9, 21))
