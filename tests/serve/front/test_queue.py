"""Who waits at a front until an editor has room, and who does not."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from serve.admission import admission
from serve.admission.admission import Request, Seat
from serve.front.ray_backend import RayBackend
from serve.hub.placement import Answer
from serve.wire.link import Address
from serve.wire.protocol import WireError
from serve.wire.work import (
    Edited,
    Frames,
    Opening,
    Queued,
    Ready,
)
from tests.serve.front.on_ray import (
    OPENING,
    Handle,
    Hub,
    good,
    listener,
    run,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("soon")]


async def test_who_waits_hears_its_place_until_there_is_room() -> None:
    hub = Hub()
    busy = admission.Editor("a", 12, 1, {"other": Seat("other", 0.1)})
    hub.placement.report(busy)
    calls: list[int] = []

    async def ask(request: Request) -> Answer:
        calls.append(1)
        if len(calls) == 3:
            hub.placement.report(admission.Editor("a", 12, 1))
        hub.asked.append(request)
        return hub.placement.ask(request)

    hub.ask = ask  # type: ignore[method-assign]
    events, handle = await run(good, hub=hub, opening=replace(OPENING, waits=True))
    assert [type(event) for event in events] == [Queued] * 2 + [Ready] + [Frames, Edited] * 3
    assert events[0].place == 1
    assert events[0].expected_s > 0
    assert len({asked.stream for asked in hub.asked}) == 1  # it keeps its place in the line
    assert handle.chosen == ["a"]


async def test_who_does_not_wait_is_refused_without_asking_an_editor() -> None:
    hub = Hub()
    hub.placement.report(admission.Editor("a", 12, 1, {"other": Seat("other", 0.1)}))
    backend_calls = []

    async def called(opening: Opening, address: Address) -> None:
        backend_calls.append(opening)
        await good(opening, address)

    backend = RayBackend(Handle(called), listener(), hub)  # type: ignore[arg-type]
    with pytest.raises(WireError, match="no editor has room") as raised:
        await anext(backend.edit(OPENING, asyncio.Event().wait))  # type: ignore[arg-type]
    assert (raised.value.code, raised.value.retry_after_s) == ("at_capacity", 5.0)
    assert not backend_calls
    assert len(hub.asked) == 1  # once: every ask counts as demand of its own


async def test_who_gives_up_in_the_queue_leaves_it() -> None:
    hub = Hub()
    hub.placement.report(admission.Editor("a", 12, 1, {"other": Seat("other", 0.1)}))
    backend = RayBackend(Handle(good), listener(), hub)  # type: ignore[arg-type]
    stream = backend.edit(replace(OPENING, waits=True), asyncio.Event().wait)  # type: ignore[arg-type]
    assert isinstance(await anext(stream), Queued)
    assert hub.placement.waiting == 1
    await stream.aclose()
    assert hub.placement.waiting == 0


async def test_who_is_cancelled_again_while_it_leaves_the_queue_leaves_it() -> None:
    """Starlette cancels what serves a request at every step, and the hub is a call away."""
    hub, asked, told = Hub(), asyncio.Event(), asyncio.Event()
    hub.placement.report(admission.Editor("a", 12, 1, {"other": Seat("other", 0.1)}))
    released = hub.released

    async def slowly(stream: str) -> None:
        asked.set()
        await told.wait()
        await released(stream)

    hub.released = slowly  # type: ignore[method-assign]
    backend = RayBackend(Handle(good), listener(), hub)  # type: ignore[arg-type]

    async def wait() -> None:
        async for _ in backend.edit(replace(OPENING, waits=True), asyncio.Event().wait):  # type: ignore[arg-type]
            pass

    waiting = asyncio.create_task(wait())
    async with asyncio.timeout(20):
        while not hub.placement.waiting:
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asked.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    told.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert hub.placement.waiting == 0
