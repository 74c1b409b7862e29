"""Streams over real sockets with the client of this tree."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from infra.runtime.errors import UserError
from modeling.editor import StreamingEditor
from serve.client import ConnectError, EditedFrame, Event, Stream, connect, edit_frames
from serve.client import stream as client_stream
from serve.delivery.driver import drive
from serve.delivery.session import Delivery, Session, State
from serve.limits import Limits
from serve.metrics import Metrics
from serve.wire.protocol import Chunk, Closed, Detail, Dropped, PromptApplied, WireError
from serve.wire.work import Frames, Opening, Work
from tests.serve.conftest import Server, clip, serving
from tests.serve.editor.works import standalone

pytestmark = pytest.mark.anyio


def edited_without_server(
    model: Path, frames: np.ndarray, prompt: str, seed: int, detail: Detail = "source"
) -> np.ndarray:
    editor = StreamingEditor.load(model)
    height, width = frames.shape[1:3]
    stream = editor.open(prompt, height=height, width=width, seed=seed, detail=detail)
    chunks = [chunk.frames for chunk in stream.push(frames)]
    rest = stream.flush()
    return np.concatenate(chunks + ([rest.frames] if rest else []))


async def send_all(stream: Stream, frames: np.ndarray, pause: float = 0.0) -> None:
    for frame in frames:
        await stream.send(frame)
        await asyncio.sleep(pause)
    stream.finish()


async def everything(stream: Stream) -> list[Event]:
    return [event async for event in stream.events()]


def indices(events: list[Event]) -> list[int]:
    return [event.index for event in events if isinstance(event, EditedFrame)]


@pytest.mark.parametrize("count", [1, 9, 10, 30])
def test_lossless_returns_the_editors_frames_exactly(
    server: Server, small_model: Path, count: int
) -> None:
    frames = clip(count)
    edited = np.stack(
        list(edit_frames(server.url, frames, "make it red", fps=16, format="rgb24", seed=3))
    )
    expected = edited_without_server(small_model, frames, "make it red", 3)
    np.testing.assert_array_equal(edited, expected)


def test_the_sync_client_ends_early_and_passes_errors_on(server: Server) -> None:
    stream = edit_frames(server.url, itertools.cycle(clip(60)), "make it red", fps=16)
    assert next(stream).shape == (32, 48, 3)
    stream.close()
    assert "liveedit-client" not in {thread.name for thread in threading.enumerate()}
    assert list(edit_frames(server.url, [], "make it red", fps=16)) == []
    with pytest.raises(WireError, match="cannot be edited here"):
        list(edit_frames(server.url, clip(1, width=8, height=8), "make it red", fps=16))
    with pytest.raises(ConnectError, match="cannot be reached"):
        list(edit_frames("ws://127.0.0.1:9", clip(1), "make it red", fps=16))
    with pytest.raises(UserError, match="ws://HOST:PORT"):
        list(edit_frames("127.0.0.1:9", clip(1), "make it red", fps=16))

    for odd in (np.zeros((32, 48, 3), np.float32), np.zeros((48, 32, 3), np.uint8)):
        with pytest.raises(UserError, match=r"is uint8 \[32, 48, 3\].* got (float32|uint8 \[48)"):
            list(edit_frames(server.url, [clip(1)[0], odd], "make it red", fps=16))

    def broken_source() -> object:
        yield clip(1)[0]
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match="unplugged"):
        list(edit_frames(server.url, broken_source(), "make it red", fps=16))


def test_the_sync_client_ends_while_its_source_waits(server: Server) -> None:
    goes_on, went_on = threading.Event(), []

    def camera() -> Iterator[np.ndarray]:
        yield from clip(9)
        went_on.append(goes_on.wait(20))

    stream = edit_frames(server.url, camera(), "make it red", fps=16)
    assert len(list(itertools.islice(stream, 9))) == 9
    stream.close()
    assert not went_on
    goes_on.set()


async def test_live_drops_when_behind_and_says_what(server: Server) -> None:
    frames = clip(300, width=160, height=160)  # faster than any two cores can edit them
    async with connect(
        server.url, "make it red", width=160, height=160, fps=60, mode="live", format="rgb24"
    ) as stream:
        sending = asyncio.create_task(send_all(stream, frames))
        events = await everything(stream)
        await sending
    got = indices(events)
    dropped = [
        n
        for e in events
        if isinstance(e, Dropped)
        for n in range(e.first_frame, e.first_frame + e.frames)
    ]
    assert dropped, "the source was faster than any editor, yet nothing was dropped"
    assert sorted(got + dropped) == list(range(300))
    assert got == sorted(got)
    assert isinstance(events[-1], Closed)
    assert events[-1].frames == len(got)


async def test_two_prompts_and_two_sessions_at_once(server: Server) -> None:
    async def one(seed: int) -> list[Event]:
        async with connect(server.url, "make it red", width=48, height=32, fps=16, seed=seed) as s:
            for n, frame in enumerate(clip(33)):
                if n == 12:
                    s.set_prompt("make it blue")
                await s.send(frame)
            s.finish()
            return await everything(s)

    for events in await asyncio.gather(one(1), one(2)):
        assert indices(events) == list(range(33))
        applied = [event for event in events if isinstance(event, PromptApplied)]
        assert [a.prompt for a in applied] == ["make it blue"]
        assert applied[0].first_frame == 9


async def test_a_cut_connection_is_resumed_without_a_lost_or_repeated_frame(
    server: Server,
) -> None:
    frames = clip(120)
    async with connect(server.url, "make it red", width=48, height=32, fps=16) as stream:
        sending = asyncio.create_task(send_all(stream, frames, pause=0.002))
        got: list[int] = []
        cuts = [5, 40, 41, 80]
        async for edited in stream:
            got.append(edited.index)
            if cuts and len(got) >= cuts[0]:
                cuts.pop(0)
                server.call(lambda: [c.supersede() for c in server.front.connections])
        await sending
    assert got == list(range(120))
    assert stream.reconnects >= 3
    assert stream.closed == Closed(120, "close")


@asynccontextmanager
async def cutting(server: Server, cuts: int) -> AsyncIterator[str]:
    """The address of a relay to `server` that cuts its first `cuts` connections after the
    WebSocket handshake, as a proxy does whose front dies."""
    left = cuts

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        cut, left = left > 0, left - 1
        there, back = await asyncio.open_connection("127.0.0.1", server.port)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                target.write(data)
                if cut and target is writer:
                    break
            writer.close()
            back.close()

        await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

    listener = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


async def test_a_first_connection_that_is_cut_unanswered_is_tried_again(server: Server) -> None:
    async with (
        cutting(server, 3) as url,
        connect(url, "make it red", width=48, height=32, fps=16) as stream,
    ):
        sending = asyncio.create_task(send_all(stream, clip(20)))
        events = await everything(stream)
        await sending
    assert indices(events) == list(range(20))
    assert stream.reconnects == 0


async def test_a_server_that_only_cuts_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_stream, "FIRST_S", 0.5)
    async with cutting(server, 1000) as url:
        with pytest.raises(ConnectError, match="cannot be reached"):
            async with connect(url, "make it red", width=48, height=32, fps=16):
                pass


async def test_a_front_that_leaves_sends_its_clients_back(server: Server) -> None:
    async with connect(server.url, "make it red", width=48, height=32, fps=16) as stream:
        sending = asyncio.create_task(send_all(stream, clip(60), pause=0.01))
        got: list[int] = []
        async for edited in stream:
            got.append(edited.index)
            if len(got) == 20:
                server.call(lambda: [c.leave() for c in server.front.connections])
        await sending
    assert got == list(range(60))
    assert stream.reconnects == 1


async def test_an_editor_that_leaves_gives_its_sessions_back_exactly(
    small_model: Path,
) -> None:
    frames = clip(60)
    with serving(small_model) as leaving:
        engine = leaving.engine
        moved = leaving.front.services.metrics.moved.labels("drain")
        async with connect(
            leaving.url, "make it red", width=48, height=32, fps=16, seed=5, format="rgb24"
        ) as stream:
            sending = asyncio.create_task(send_all(stream, frames, pause=0.01))
            edited = []
            async for frame in stream:
                edited.append(frame.pixels)
                if len(edited) in (9, 33):
                    leaving.call(engine.leave)
                    await asyncio.sleep(0.2)
                    async with asyncio.timeout(60):
                        while not moved._value.get():  # at 9 not all frames can be there yet
                            await asyncio.sleep(0.01)
                    leaving.call(engine._leaving.clear)  # as another editor
            await sending
    expected = edited_without_server(small_model, frames, "make it red", 5)
    np.testing.assert_array_equal(np.stack(edited), expected)


async def test_frames_ahead_of_their_chunk_move_with_the_stream(small_model: Path) -> None:
    """Through two moves within a chunk: no frame is given out twice, and the bits are the same."""
    frames = clip(33)
    engine = standalone(StreamingEditor.load(small_model))
    opening = Opening("s", "make it red", 48, 32, 16.0, "lossless", seed=5, detail="source")
    session = Session(opening)
    given: list[int] = []

    def feed(count: int) -> None:
        for _ in range(count):
            session.feed(session.next_frame, 0, frames[session.next_frame])

    async def take() -> Work:
        work = await Session.take(session)
        given.append(len(work.frames))
        return work

    async def until(count: int) -> None:
        async with asyncio.timeout(20):
            while len(given) < count or engine.scheduler.running_since is not None:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # until the editor asks again

    async def move() -> None:
        engine.leave()
        async with asyncio.timeout(20):
            while session.state is not State.RECOVERING:
                await asyncio.sleep(0.001)
        engine._leaving.clear()  # as another editor

    session.take = take  # type: ignore[method-assign]
    edited: list[np.ndarray] = []

    async def collect() -> None:
        async for event in drive(engine, session, Metrics()):
            if isinstance(event, Frames):
                frames = event.frames
            elif isinstance(event, Delivery):
                edited.append(frames)
                session.sent(len(event.frames))

    collecting = asyncio.create_task(collect())
    feed(9)
    await until(1)
    feed(4)
    await until(2)
    await move()
    feed(4)
    await until(3)
    await move()
    feed(4)
    await until(4)
    feed(12)
    session.finish()
    async with asyncio.timeout(20):
        await collecting
    engine.on.scheduler.stop()
    assert given[:4] == [9, 4, 4, 4]  # nothing twice
    expected = edited_without_server(small_model, frames, "make it red", 5)
    np.testing.assert_array_equal(np.concatenate(edited), expected)


async def test_idle_sessions_end(small_model: Path) -> None:
    limits = Limits(idle_timeout_s=2.0)  # more than a busy machine takes for four frames
    with serving(small_model, limits) as server:
        async with connect(server.url, "make it red", width=48, height=32, fps=16) as stream:
            for frame in clip(4):
                await stream.send(frame)
            events = await everything(stream)
    assert indices(events) == [0, 1, 2, 3]
    assert events[-1] == Closed(4, "idle")


async def test_chunk_messages_add_up(server: Server) -> None:
    async with connect(server.url, "make it red", width=48, height=32, fps=16) as stream:
        sending = asyncio.create_task(send_all(stream, clip(50)))
        events = await everything(stream)
        await sending
    chunks = [event for event in events if isinstance(event, Chunk)]
    assert sum(chunk.frames for chunk in chunks) == 50
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.latency_ms >= chunk.compute_ms * 0.5 for chunk in chunks)
