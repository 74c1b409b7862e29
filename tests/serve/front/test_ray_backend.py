"""The front's side of an editor on Ray: the real inbox and link, and a handle that is ours.

What Ray does itself is tested on a cluster; this is what the front makes of each of its answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from serve.admission import admission
from serve.admission.admission import Request, Seat, Sizes
from serve.admission.decisions import Scale
from serve.front import ray_backend
from serve.front.ray_backend import RayBackend
from serve.hub.placement import Answer, Placement, Retired
from serve.wire import conversation
from serve.wire.link import Address, Link, Listener
from serve.wire.protocol import WireError
from serve.wire.split_state import SplitState
from serve.wire.work import (
    Edited,
    EditorEvent,
    EditorLostError,
    Moved,
    Opening,
    Queued,
    Ready,
    SupersededError,
    Take,
    Work,
)

pytestmark = pytest.mark.anyio

OPENING = Opening("s", "p", 6, 4, 16.0, "live")
READY = Ready("m", 12, 9, 0)
Replica = Callable[[Opening, Address], Awaitable[None]]


class Call:
    """A call's answer: it can be awaited and cancelled."""

    def __init__(self, edit: Awaitable[None]) -> None:
        self.edit, self.cancelled = asyncio.ensure_future(edit), False

    def __await__(self) -> Generator[Any]:
        return self.edit.__await__()

    def cancel(self) -> None:
        self.cancelled = True
        self.edit.cancel()


class Handle:
    """A deployment handle whose n-th call goes to the n-th replica, the last one again.

    `chosen` are the editors that the calls were for.
    """

    def __init__(self, *replicas: Replica) -> None:
        self.replicas, self.calls, self.chosen = replicas, list[Call](), list[str]()
        self.openings: list[Opening] = []
        self.edit = self

    def options(self, *, session_id: str) -> Handle:
        self.chosen.append(session_id)
        return self

    def remote(self, opening: Opening, address: Address) -> Call:
        replica = self.replicas[min(len(self.calls), len(self.replicas) - 1)]
        self.openings.append(opening)
        self.calls.append(Call(replica(opening, address)))
        return self.calls[-1]


def listener() -> Listener:
    return Listener("127.0.0.1", conversation.KINDS)


class Hub:
    """`placement.Places` on a placement of its own, with empty `editors`."""

    def __init__(self, editors: str = "a") -> None:
        self.placement = Placement(Scale())
        for name in editors:
            self.placement.report(admission.Editor(name, 12, 1))
        self.asked: list[Request] = []
        self.over: list[str] = []

    async def ask(self, request: Request) -> Answer:
        self.asked.append(request)
        return self.placement.ask(request)

    async def released(self, stream: str) -> None:
        self.over.append(stream)
        self.placement.released(stream)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again without a pause that a test would wait for."""
    monkeypatch.setattr(ray_backend, "ASKS_S", 0.01)
    monkeypatch.setattr(conversation, "LAST_WORDS_S", 0.1)


def work(number: int, last: bool = False) -> Work:
    return Work(number, "p", np.full((2, 4, 6, 3), number, np.uint8), last)


def edited(given: Work) -> Edited:
    return Edited(given.number, given.number, given.frames, 1.0, 4, 1.0, 0.0, 0.0, None, b"s")


class Editor:
    """`work.Backend`: edits `chunks` at most, then raises `error` or gives the stream back."""

    def __init__(self, error: Exception | None = None, chunks: int | None = None) -> None:
        self.error, self.chunks = error, chunks

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        if self.error and self.chunks is None:
            raise self.error
        yield READY
        for number in itertools.count():
            if number == self.chunks:
                if self.error:
                    raise self.error
                yield Moved(SplitState(b"state"), 4)
                return
            given = await take()
            yield edited(given)
            if given.last:
                return


def replica(editor: Editor) -> Replica:
    """As `EditorReplica.edit`."""

    async def edit(opening: Opening, address: Address) -> None:
        link = await Link.connect(address, conversation.KINDS)
        try:
            await conversation.answer(editor, opening, link)
        finally:
            link.close()

    return edit


good = replica(Editor())


def refusing(code: Any) -> Replica:
    return replica(Editor(WireError(code, "no", 3.0)))


async def silent(opening: Opening, address: Address) -> None:
    await asyncio.sleep(60)


def raising(error: Exception, *, after: int | None = None) -> Replica:
    """Before it connects, or after so many chunks."""

    async def edit(opening: Opening, address: Address) -> None:
        if after is not None:
            await replica(Editor(error, after))(opening, address)
        raise error

    return edit


async def run(
    *replicas: Replica, works: int = 3, hub: Hub | None = None, opening: Opening = OPENING
) -> tuple[list[Any], Handle]:
    handle, hub = Handle(*replicas), hub or Hub()
    backend = RayBackend(handle, listener(), hub)  # type: ignore[arg-type]
    given = iter([work(n, n == works - 1) for n in range(works)])

    async def take() -> Work:
        return next(given)

    events = []
    try:
        async with asyncio.timeout(20), aclosing(backend.edit(opening, take)) as stream:
            async for event in stream:
                events.append(event)
    finally:
        await asyncio.sleep(0)
        assert all(call.cancelled for call in handle.calls), "a call was left behind"
        assert backend.listener._expected == {}, "an address was left behind"
        backend.listener.close()
        assert hub.over == list(dict.fromkeys(asked.stream for asked in hub.asked))
        assert hub.placement.waiting == 0
        assert all(not e.streams for e in hub.placement.editors), "a place was left behind"
    return events, handle


async def test_a_stream_is_one_call_and_its_chunks_go_over_the_link() -> None:
    (ready, *chunks), handle = await run(good)
    assert ready == READY
    assert [chunk.number for chunk in chunks] == [0, 1, 2]
    assert [int(chunk.frames.max()) for chunk in chunks] == [0, 1, 2]
    assert len(handle.calls) == 1
    assert handle.chosen == ["a"]


async def test_a_stream_asks_for_what_it_is() -> None:
    hub = Hub()
    opening = replace(
        OPENING, session="x", epoch=3, waits=True, again=True, work_size="32x16", detail="source"
    )
    _, handle = await run(good, hub=hub, opening=opening)
    (asked,), (given,) = hub.asked, handle.openings
    sizes = Sizes((4, 6), (16, 32), "source")
    assert asked == Request(given.stream, "x", sizes, 16.0, epoch=3, waits=True, again=True)
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
    assert [asked.sizes.model for asked in hub.asked] == ["m 1", "m 2"]
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
    assert [type(event) for event in events] == [Queued] * 2 + [Ready] + [Edited] * 3
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


async def test_an_editor_that_ends_without_a_word_is_lost() -> None:
    async def ends(opening: Opening, address: Address) -> None:
        pass

    with pytest.raises(EditorLostError, match="ended the stream"):
        await run(ends)


async def test_what_an_editor_said_before_it_ended_is_heard() -> None:
    events, _ = await run(replica(Editor(chunks=1)))
    assert [type(event) for event in events] == [Ready, Edited, Moved]
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
