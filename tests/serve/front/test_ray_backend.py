"""The front's side of an editor on Ray: what it makes of each answer that Ray, an editor or the hub
may give. What Ray does itself is tested on a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve.admission.admission import Request, Sizes
from serve.front import ray_backend
from serve.front.ray_backend import RayBackend
from serve.hub.placement import Answer, Retired
from serve.wire import conversation
from serve.wire.link import Address, Link
from serve.wire.protocol import WireError
from serve.wire.split_state import SplitState
from serve.wire.work import (
    Edited,
    EditorLostError,
    Frames,
    Moved,
    Opening,
    Ready,
    SupersededError,
)
from tests.serve.front.on_ray import (
    OPENING,
    READY,
    Editor,
    Handle,
    Hub,
    good,
    listener,
    raising,
    refusing,
    replica,
    run,
    silent,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("soon")]


async def test_a_stream_is_one_call_and_its_chunks_go_over_the_link() -> None:
    (ready, *made), handle = await run(good)
    assert ready == READY
    assert [int(frames.frames.max()) for frames in made[::2]] == [0, 1, 2]
    assert [chunk.number for chunk in made[1::2]] == [0, 1, 2]
    assert len(handle.calls) == 1
    assert handle.chosen == ["a"]


@pytest.mark.parametrize(("waits", "again"), [(True, False), (False, True)])
async def test_a_stream_asks_for_what_it_is(waits: bool, again: bool) -> None:
    hub = Hub()
    opening = replace(
        OPENING, session="x", epoch=3, waits=waits, again=again, work_size="32x16", detail="source"
    )
    _, handle = await run(good, hub=hub, opening=opening)
    (asked,), (given,) = hub.asked, handle.openings
    sizes = Sizes((4, 6), (16, 32), "source")
    assert asked == Request(given.stream, "x", sizes, 16.0, epoch=3, waits=waits, again=again)
    assert given == replace(opening, stream=asked.stream)


async def test_a_lossless_one_says_that_it_can_wait_and_which_model_it_is_for() -> None:
    hub = Hub()
    await run(good, hub=hub, opening=replace(OPENING, mode="lossless", model="m", version="m 1"))
    (asked,) = hub.asked
    assert (asked.live, asked.name, asked.sizes.model) == (False, "m", "m 1")


async def test_a_version_that_is_served_no_more_gives_way_to_the_one_that_is() -> None:
    hub = Hub()
    ask = hub.ask

    async def retired(request: Request) -> Answer:
        if request.sizes.model != "m 1":
            return await ask(request)
        hub.asked.append(request)
        assert len(hub.asked) < 5, "it asks for the same again and again"
        return Retired("m 2")

    hub.ask = retired  # type: ignore[method-assign]
    (ready, *_), handle = await run(good, hub=hub, opening=replace(OPENING, version="m 1"))
    assert ready == READY
    assert [(asked.sizes.model, asked.again) for asked in hub.asked] == [
        ("m 1", False),
        ("m 2", False),
    ]
    assert [opening.version for opening in handle.openings] == ["m 2"]


async def test_an_editor_hears_when_its_front_has_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the link, also where its call is not cancelled: a front that died cancels nothing."""
    ended = asyncio.Event()

    async def listens(opening: Opening, address: Address) -> None:
        link = await Link.connect(address, conversation.KINDS)
        await link.write(READY)

        async def hear() -> None:
            with contextlib.suppress(OSError):
                await link.read()
            ended.set()

        hearing.append(asyncio.create_task(hear()))
        await asyncio.Event().wait()

    hearing: list[asyncio.Task[None]] = []
    backend = RayBackend(Handle(listens), listener(), Hub())  # type: ignore[arg-type]
    stream = backend.edit(OPENING, asyncio.Event().wait)  # type: ignore[arg-type]
    assert await anext(stream) == READY
    closed: list[Link] = []
    close = Link.close
    monkeypatch.setattr(Link, "close", lambda self: (closed.append(self), close(self)))
    await stream.aclose()
    assert len(closed) == 1
    async with asyncio.timeout(60):
        await ended.wait()
    backend.listener.close()


@pytest.mark.parametrize("refusals", [1, 3])
async def test_an_editor_that_has_no_room_is_passed_over(refusals: int) -> None:
    (ready, *_), handle = await run(*[refusing("at_capacity")] * refusals, good)
    assert ready == READY
    assert len(handle.calls) == len(handle.chosen) == refusals + 1
    assert len({opening.stream for opening in handle.openings}) == refusals + 1


async def test_no_room_anywhere_is_said() -> None:
    with pytest.raises(WireError) as raised:
        await run(refusing("at_capacity"))
    assert (raised.value.code, raised.value.retry_after_s) == ("at_capacity", 3.0)


async def test_another_refusal_is_the_answer() -> None:
    with pytest.raises(WireError) as raised:
        await run(refusing("internal"), good)
    assert (raised.value.code, str(raised.value)) == ("internal", "no")


async def test_a_stream_that_a_newer_one_ended_says_so() -> None:
    for after in (None, 2):
        with pytest.raises(SupersededError):
            await run(replica(Editor(SupersededError(), after)))


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


@pytest.mark.parametrize("error", [ActorDiedError(), RayServeException("it is shut down")])
async def test_an_editor_that_cannot_be_called_is_lost(error: Exception) -> None:
    def call(*_: Any) -> None:
        raise error

    editors = SimpleNamespace(edit=SimpleNamespace(remote=call))
    handle: Any = SimpleNamespace(options=lambda session_id: editors)
    backend = RayBackend(handle, listener(), Hub())  # type: ignore[arg-type]
    with pytest.raises(EditorLostError):
        await anext(backend.edit(OPENING, asyncio.Event().wait))  # type: ignore[arg-type]
    backend.listener.close()


async def test_an_editor_that_ends_without_a_word_is_lost() -> None:
    async def ends(opening: Opening, address: Address) -> None:
        pass

    with pytest.raises(EditorLostError, match="ended the stream"):
        await run(ends)


async def test_what_an_editor_said_before_it_ended_is_heard() -> None:
    events, _ = await run(replica(Editor(chunks=1)))
    assert [type(event) for event in events] == [Ready, Frames, Edited, Moved]
    assert events[-1] == Moved(SplitState(b"state"), 4)


async def test_every_try_has_an_address_of_its_own() -> None:
    seen = []

    async def full(opening: Opening, address: Address) -> None:
        seen.append(address)
        await refusing("at_capacity")(opening, address)

    with pytest.raises(WireError):
        await run(full)
    assert len(seen) == 4
    assert len({address.secret for address in seen}) == 4
