"""The front's side of an editor on Ray: the real inbox and link, and a handle that is ours.

What Ray does itself is tested on a cluster; this is what the front makes of each of its answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from serve.front import ray_backend
from serve.front.ray_backend import RayBackend
from serve.wire.link import Address, EditorLink, Inbox
from serve.wire.protocol import WireError
from serve.wire.work import Edited, EditorLostError, Moved, Opening, Ready, Refused, Work

pytestmark = pytest.mark.anyio

OPENING = Opening("s", "p", 6, 4, 16.0, "live")
READY = Ready("m", 12, 9, 0)
Replica = Callable[[Opening, Address], AsyncGenerator[Any]]


class Call:
    """A streaming call's answer: an iterator that can be cancelled."""

    def __init__(self, items: AsyncGenerator[Any]) -> None:
        self.items, self.cancelled = items, False

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        return await anext(self.items)

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment handle whose n-th call goes to the n-th replica, the last one again."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas, self.calls = replicas, list[Call]()
        self.edit = self

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, opening: Opening, address: Address) -> Call:
        replica = self.replicas[min(len(self.calls), len(self.replicas) - 1)]
        self.calls.append(Call(replica(opening, address)))
        return self.calls[-1]


def work(number: int, last: bool = False) -> Work:
    return Work(number, "p", np.full((2, 4, 6, 3), number, np.uint8), last)


def edited(given: Work) -> Edited:
    return Edited(given.number, given.number, given.frames, 1.0, 4, 1.0, 0.0, 0.0, None, b"s")


async def good(opening: Opening, address: Address) -> AsyncGenerator[Any]:
    link = await EditorLink.connect(address)
    yield READY
    while True:
        given = await link.take()
        await link.send(edited(given))
        if given.last:
            link.close()
            return


def refusing(code: Any) -> Replica:
    async def replica(opening: Opening, address: Address) -> AsyncGenerator[Any]:
        yield Refused(code, "no", 3.0)

    return replica


async def silent(opening: Opening, address: Address) -> AsyncGenerator[Any]:
    await asyncio.sleep(60)
    yield READY


def raising(error: Exception, *, after: int | None = None) -> Replica:
    """Before Ready, or after so many chunks."""

    async def replica(opening: Opening, address: Address) -> AsyncGenerator[Any]:
        if after is None:
            raise error
        link = await EditorLink.connect(address)
        yield READY
        for _ in range(after):
            await link.send(edited(await link.take()))
        link.close()
        raise error

    return replica


async def run(*replicas: Replica, works: int = 3) -> tuple[list[Any], Handle]:
    handle = Handle(*replicas)
    backend = RayBackend(handle, Inbox("127.0.0.1"))  # type: ignore[arg-type]
    given = iter([work(n, n == works - 1) for n in range(works)])

    async def take() -> Work:
        return next(given)

    events = []
    try:
        async with asyncio.timeout(20), aclosing(backend.edit(OPENING, take)) as stream:
            async for event in stream:
                events.append(event)
    finally:
        await asyncio.sleep(0)
        assert all(call.cancelled for call in handle.calls), "a call was left behind"
        assert backend.inbox._slots == {}, "a slot was left behind"
    return events, handle


async def test_a_stream_is_one_call_and_its_chunks_go_over_the_link() -> None:
    (ready, *chunks), handle = await run(good)
    assert ready == READY
    assert [chunk.number for chunk in chunks] == [0, 1, 2]
    assert [int(chunk.frames.max()) for chunk in chunks] == [0, 1, 2]
    assert len(handle.calls) == 1


@pytest.mark.parametrize("refusals", [1, 3])
async def test_an_editor_that_has_no_room_is_passed_over(refusals: int) -> None:
    (ready, *_), handle = await run(*[refusing("at_capacity")] * refusals, good)
    assert ready == READY
    assert len(handle.calls) == refusals + 1


async def test_no_room_anywhere_is_said() -> None:
    with pytest.raises(WireError) as raised:
        await run(refusing("at_capacity"))
    assert (raised.value.code, raised.value.retry_after_s) == ("at_capacity", 3.0)


async def test_another_refusal_is_the_answer() -> None:
    with pytest.raises(WireError) as raised:
        await run(refusing("internal"), good)
    assert (raised.value.code, str(raised.value)) == ("internal", "no")


async def test_no_answer_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_backend, "OPEN_S", 0.1)
    with pytest.raises(WireError, match="every editor is busy") as raised:
        await run(silent)
    assert (raised.value.code, raised.value.retry_after_s) == ("at_capacity", 5.0)


FAILED = RayTaskError("edit", "Traceback: secret path", ValueError("broken"))


@pytest.mark.parametrize("after", [None, 0, 2])
async def test_an_editor_that_fails_is_an_internal_error_that_tells_no_secrets(
    after: int | None,
) -> None:
    with pytest.raises(WireError, match="its log says why") as raised:
        await run(raising(FAILED, after=after))
    assert raised.value.code == "internal"
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "error", [ActorDiedError(), BackPressureError(num_queued_requests=1, max_queued_requests=1)]
)
@pytest.mark.parametrize("after", [None, 0, 2])
async def test_an_editor_that_dies_is_lost(error: Exception, after: int | None) -> None:
    with pytest.raises(EditorLostError):
        await run(raising(error, after=after))


async def test_an_editor_that_ends_without_a_word_is_lost() -> None:
    async def ends(opening: Opening, address: Address) -> AsyncGenerator[Any]:
        return
        yield

    with pytest.raises(EditorLostError, match="ended the stream"):
        await run(ends)


async def test_what_an_editor_said_before_it_ended_is_heard() -> None:
    async def moves(opening: Opening, address: Address) -> AsyncGenerator[Any]:
        link = await EditorLink.connect(address)
        yield READY
        await link.send(edited(await link.take()))
        await link.send(Moved(b"state", 4))
        link.close()

    events, _ = await run(moves)
    assert [type(event) for event in events] == [Ready, Edited, Moved]
    assert events[-1] == Moved(b"state", 4)


async def test_every_try_has_an_address_of_its_own() -> None:
    seen = []

    async def full(opening: Opening, address: Address) -> AsyncGenerator[Any]:
        seen.append(address)
        yield Refused("at_capacity", "no", 3.0)

    with pytest.raises(WireError):
        await run(full)
    assert len(seen) == 4
    assert len({address.stream for address in seen}) == 4
    assert len({address.secret for address in seen}) == 4
