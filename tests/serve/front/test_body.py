"""Bodies through an ingress that buffers without bound, as Ray's does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve.front.body import BodyFlow
from serve.front.socket import EXTENSION, GRANT, MAX_UNWRITTEN, WRITTEN
from serve.ingress.backpressure import BODY_AHEAD, FlowControl
from tests.serve.front.clock import JumpingLoop
from tests.serve.front.wires import settle

pytestmark = pytest.mark.anyio

PIECE = 64 * 1024
Told = dict[str, Any]


class Wire:
    """A client's connection, and between it and the application an ingress that reads and answers
    as fast as it can."""

    def __init__(self, application: Callable[..., Awaitable[None]], stalled_s: float = 60) -> None:
        self.read = 0  # pieces taken from the client
        self.sent: list[Told] = []  # messages given to the client
        self.writable = asyncio.Event()
        self.incoming: asyncio.Queue[Told] = asyncio.Queue()
        self.application = BodyFlow(application, stalled_s)

    def start(self) -> asyncio.Task[None]:
        scope = {"type": "http", "extensions": None}
        return asyncio.create_task(FlowControl(self._ingress)(scope, self._receive, self._send))

    async def _receive(self) -> Told:
        message = await self.incoming.get()
        self.read += message["type"] == "http.request"
        return message

    async def _send(self, message: Told) -> None:
        await self.writable.wait()
        self.sent.append(message)

    async def _ingress(self, scope: Any, receive: Any, send: Any) -> None:
        inward: asyncio.Queue[Told] = asyncio.Queue()
        outward: asyncio.Queue[Told] = asyncio.Queue()

        async def pump(take: Any, put: Any) -> None:
            while True:
                await put(await take())

        pumps = [
            asyncio.create_task(pump(receive, inward.put)),
            asyncio.create_task(pump(outward.get, send)),
        ]
        try:
            await self.application(scope, inward.get, outward.put)
        finally:
            for task in pumps:
                task.cancel()


async def test_an_upload_is_read_no_further_than_it_is_wanted() -> None:
    gate = asyncio.Semaphore(0)
    got = bytearray()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            await gate.acquire()
            message = await receive()
            got.extend(message["body"])
            more = message["more_body"]

    wire = Wire(application)
    for n in range(100):
        body = bytes([n]) * 10
        wire.incoming.put_nowait({"type": "http.request", "body": body, "more_body": n < 99})
    running = wire.start()
    await settle()
    assert wire.read == BODY_AHEAD
    for _ in range(20):
        gate.release()
    await settle()
    assert wire.read == BODY_AHEAD + 20
    for _ in range(80):
        gate.release()
    await running
    assert bytes(got) == b"".join(bytes([n]) * 10 for n in range(100))


async def test_an_answer_is_made_no_further_than_it_is_read() -> None:
    made = 0

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal made
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(PIECE), "more_body": True})
            made += 1
        await asyncio.Event().wait()

    wire = Wire(application)
    running = wire.start()
    await settle()
    assert made == MAX_UNWRITTEN // PIECE + 1
    wire.writable.set()
    await settle()
    await settle()
    assert made == 100
    assert len(wire.sent) == 101
    running.cancel()


def test_who_reads_nothing_of_an_answer_for_so_long_is_gone() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(MAX_UNWRITTEN // PIECE + 2):
            await send({"type": "http.response.body", "body": bytes(PIECE), "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    async def waited() -> float:
        began = asyncio.get_running_loop().time()
        await Wire(application, stalled_s=60.0).start()
        return asyncio.get_running_loop().time() - began

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        assert runner.run(waited()) == pytest.approx(60.0)


class Bare:
    """An application below `BodyFlow`, whose ingress says what it is told to."""

    def __init__(self, application: Callable[..., Awaitable[None]], stalled_s: float = 60) -> None:
        self.said, self.sent = asyncio.Queue[Told](), list[Told]()
        scope = {"type": "http", "extensions": {EXTENSION: {}}}
        flow = BodyFlow(application, stalled_s)
        self.running = asyncio.ensure_future(flow(scope, self.said.get, self._send))

    async def _send(self, message: Told) -> None:
        self.sent.append(message)


async def test_what_is_taken_is_granted_again_and_no_more_than_there_is() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    bare = Bare(application)
    for n in range(5):
        bare.said.put_nowait({"type": "http.request", "body": b"x", "more_body": n < 4})
        await settle()
        assert bare.sent == [{"type": GRANT, "messages": 1, "size": 0}] * min(n + 1, 4)
    await bare.running


async def test_the_application_goes_on_when_enough_was_written_and_not_before() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        for size in (3 * MAX_UNWRITTEN, 1, MAX_UNWRITTEN, 0):  # one of any size
            await send({"type": "http.response.body", "body": bytes(size), "more_body": True})

    bare = Bare(application)
    for written, sent in (
        (0, 1), (MAX_UNWRITTEN, 1), (MAX_UNWRITTEN - 1, 1), (1, 2), (1, 3), (MAX_UNWRITTEN, 4),
    ):  # fmt: skip
        bare.said.put_nowait({"type": WRITTEN, "bytes": written})
        await settle()
        assert len(bare.sent) == sent, (written, sent)
    assert bare.running.done()


def test_who_leaves_is_not_waited_for() -> None:
    """Else its editor would be held until the client counts as stalled."""
    heard: list[tuple[float, str]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.body", "body": bytes(2 * MAX_UNWRITTEN)})
        await send({"type": "http.response.body", "body": b"more"})
        heard.append((asyncio.get_running_loop().time(), (await receive())["type"]))

    async def left() -> None:
        bare = Bare(application, stalled_s=60.0)
        await asyncio.sleep(10.0)
        bare.said.put_nowait({"type": "http.disconnect"})
        await bare.running

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(left())
    assert heard == [(pytest.approx(110.0), "http.disconnect")]


@pytest.mark.parametrize("fails", [False, True])
async def test_nothing_runs_on_after_the_application(fails: bool) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await settle()
        if fails:
            raise RuntimeError("dead")

    before = asyncio.all_tasks()
    bare = Bare(application)
    with pytest.raises(RuntimeError, match="dead") if fails else contextlib.nullcontext():
        await bare.running
    await settle()
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("extensions", [None, {}, {"http.response.push": {}}])
async def test_plain_servers_are_left_alone(extensions: Any) -> None:
    given: list[Any] = []

    async def application(*asgi: Any) -> None:
        given.extend(asgi)

    async def receive() -> Any: ...

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "extensions": extensions}
    await BodyFlow(application, 60)(scope, receive, send)
    assert given == [scope, receive, send]
