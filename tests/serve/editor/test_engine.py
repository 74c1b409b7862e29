"""The editor's side of a session, with a real editor whose answer is known."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from serve.admission.admission import Sizes
from serve.admission.ladder import Calm
from serve.admission.rungs import NAMES
from serve.editor.engine import Engine, _open
from serve.editor.splitter import Splitter, joined
from serve.metrics import EditorMetrics
from serve.wire.protocol import WireError
from serve.wire.work import Edited, Frames, Moved, Opening, Ready
from tests.known_editors import assert_edited, expected_edit
from tests.serve.editor.works import (
    BLUE,
    OPENING,
    RED,
    SIZES,
    SMALL,
    SOURCE,
    WORKS,
    Source,
    chunks,
    events,
    filling,
    following,
    replaced,
    work,
)

pytestmark = pytest.mark.anyio


async def test_words_that_the_model_was_never_taught_are_named(engine: Engine) -> None:
    engine.editor.card["words"] = BLUE.split()
    ready, first, *rest = await events(engine, OPENING, *WORKS)
    assert ready.unknown == first.unknown == "red"
    assert [e.unknown for e in rest] == ["", ""]


async def test_a_prompt_is_read_when_it_changes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with every chunk: what the mask cache kept of it would go each time, too."""
    read, encode = list[str](), engine.editor.encode_prompt
    monkeypatch.setattr(engine.editor, "encode_prompt", lambda p: (read.append(p), encode(p))[1])
    await events(engine, OPENING, *WORKS)
    assert read == [RED, BLUE]


async def test_a_chunks_frames_go_ahead_of_it(engine: Engine) -> None:
    found = [event async for event in engine.edit(OPENING, Source(*WORKS).take)][1:]
    assert [type(event) for event in found] == [Frames, Edited] * 3
    assert [len(frames.frames) for frames in found[::2]] == [9, 12, 12]


async def test_a_state_is_packed_while_its_frames_are_on_their_way(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, split = asyncio.Event(), Splitter.split

    async def heard(splitter: Splitter, state: Any) -> Any:
        made = await split(splitter, state)
        packed.set()
        return made

    monkeypatch.setattr(Splitter, "split", heard)
    async with aclosing(engine.edit(OPENING, Source(*WORKS).take)) as stream:
        while not isinstance(await anext(stream), Frames):
            pass
        await asyncio.wait_for(packed.wait(), 20)  # nobody asks for what follows the frames


async def test_chunks_come_back_as_they_were_asked_for(engine: Engine) -> None:
    began = time.monotonic()
    ready, *edited = await events(engine, OPENING, *WORKS)
    whole_ms = 1000 * (time.monotonic() - began)
    assert ready == Ready("known", 12, 9, chunks=0)
    assert [(e.number, e.index, len(e.frames)) for e in edited] == [
        (0, 0, 9),
        (1, 1, 12),
        (2, 2, 12),
    ]
    pictures = np.concatenate([e.frames for e in edited])
    # A chunk is edited by the prompt of the work that completes it.
    assert_edited(pictures[:9], SOURCE[:9], RED)
    wanted = np.concatenate([expected_edit(SOURCE, RED)[:9], expected_edit(SOURCE, BLUE)[9:]])
    assert np.abs(pictures.astype(int) - wanted).max() <= 1
    assert [e.steps for e in edited] == [4, 4, 4]
    assert edited[0].recomputed == 1.0
    assert all(0 < e.recomputed <= 1 for e in edited)
    assert [e.ahead_ms > 0 for e in edited] == [False, True, True]
    assert all(e.compute_ms > 0 and e.wait_ms >= 0 for e in edited)
    assert all(e.wait_ms + e.compute_ms <= e.held_ms < whole_ms for e in edited)
    assert [e.mask for e in edited] == [None] * 3
    assert [e.state and len(e.state.parts) for e in edited] == [1, 1, None]
    assert engine.capacity.loads == {}


async def test_masks_are_for_those_who_ask(engine: Engine) -> None:
    _, edited, _ = await events(engine, replaced(mask=True), WORKS[0], work(1, 9, 0, last=True))
    assert (edited.mask.shape, edited.mask.dtype) == ((3, 2, 3), bool)


async def test_a_stream_goes_on_from_the_state_that_was_given_back(engine: Engine) -> None:
    _, first, _ = await events(engine, OPENING, WORKS[0], work(1, 9, 0, last=True))
    kept = joined(first.state)
    assert (kept.kv, kept.encoder, kept.decoder, len(kept.pending)) == (None, None, None, 0)
    with pytest.raises(ValueError, match=f"part {first.state.names[0]} .* is damaged"):
        joined(replace(first.state, parts=(replace(first.state.parts[0], data=b"x"),)))
    ready, *edited = await events(engine, replaced(state=first.state), *WORKS[1:])
    assert ready.chunks == 1
    assert [e.index for e in edited] == [1, 2]
    pictures = np.concatenate([e.frames for e in edited])
    wanted = np.concatenate([expected_edit(SOURCE, BLUE)[9:]])
    assert np.abs(pictures.astype(int) - wanted).max() <= 1


async def test_a_state_of_another_model_is_refused(engine: Engine) -> None:
    _, first, _ = await events(engine, OPENING, WORKS[0], work(1, 9, 0, last=True))
    engine.editor.identity = engine.editor.latents = "another"
    with pytest.raises(WireError, match="edited by another model than is served now") as raised:
        await events(engine, replaced(state=first.state), *WORKS[1:])
    assert raised.value.code == "bad_request"
    assert engine.capacity.loads == {}


async def test_a_stream_is_edited_at_its_working_size(engine: Engine) -> None:
    _, *edited = await events(engine, replace(SMALL, mask=True), *WORKS)
    local = engine.editor.open(RED, height=32, width=48, seed=5, work_size="32x16", detail="source")
    (wanted,) = local.push(SOURCE[:9])
    np.testing.assert_array_equal(edited[0].frames, wanted.frames)
    assert edited[0].mask.shape == (3, 1, 2)  # of what the model sees
    assert edited[0].work_size == "32x16"
    assert engine.capacity.costs.keys() == {Sizes((32, 48), (16, 32), "source")}
    kept = joined(edited[0].state)
    assert (kept.work_height, kept.work_width, kept.detail) == (16, 32, "source")


@pytest.mark.parametrize("opening", [OPENING, SMALL])
async def test_a_leaving_editor_gives_the_exact_state_back_with_what_went_ahead(
    engine: Engine, opening: Opening
) -> None:
    _, *unbroken = await events(engine, opening, *WORKS)
    source = Source(*WORKS[:2])
    async with aclosing(engine.edit(opening, source.take)) as stream:
        assert isinstance(await anext(stream), Ready)
        before = await following(stream)
        assert isinstance(before, Edited)
        moving = asyncio.ensure_future(anext(stream))
        while source.works or engine.scheduler.running_since is not None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        engine.leave()
        moved = await moving
    assert isinstance(moved, Moved)
    assert moved.ahead == 4
    assert moved.state.parts == ()  # the front has them
    state = moved.state.completed(before.state)
    assert engine.capacity.loads == {}
    (_, given_back) = await events(engine, opening, *WORKS)
    assert isinstance(given_back, Moved)  # at once, before any work
    engine._leaving.clear()  # as another editor
    _, *edited = await events(engine, replace(opening, state=state), *WORKS[2:])
    assert [len(one.frames) for one in edited] == [12, 12]
    for one, wanted in zip(edited, unbroken[1:], strict=True):
        np.testing.assert_array_equal(one.frames, wanted.frames)


async def test_what_a_chunk_cost_is_known_afterwards(engine: Engine) -> None:
    took = iter([0.0, 0.25, 0.1, 0.2, 0.1, 0.1, 0.1])
    seen: list[tuple[Sizes, float]] = []
    run, observe = engine.scheduler.run, engine.capacity.observe

    async def timed(*args: Any, **named: Any) -> Any:
        return replace(await run(*args, **named), run_s=next(took), wait_s=0.5)

    def noted(sizes: Sizes, seconds: float, *more: Any) -> None:
        seen.append((sizes, seconds))
        observe(sizes, seconds, *more)

    engine.scheduler.run = timed  # type: ignore[method-assign]
    engine.capacity.observe = noted  # type: ignore[method-assign]
    editor_open = engine.editor.open

    def cheap(*args: Any, **named: Any) -> Any:
        stream = editor_open(*args, **named)
        push = stream.push

        def pushed(frames: np.ndarray) -> Any:
            for chunk in push(frames):
                yield replace(chunk, compute_ms=280.0 if chunk.index == 0 else 1.0)

        stream.push = pushed  # type: ignore[method-assign]
        return stream

    engine.editor.open = cheap  # type: ignore[method-assign]
    _, first, second, third = await events(engine, OPENING, *WORKS)
    # The first: what the device says it took, its refresh with it. The second: both its works.
    assert seen[0] == (SIZES, pytest.approx(0.28))
    assert seen[1] == (SIZES, pytest.approx(0.3))
    assert (first.compute_ms, first.ahead_ms, first.wait_ms) == pytest.approx((250.0, 0.0, 500.0))
    assert (second.compute_ms, second.ahead_ms) == pytest.approx((200.0, 100.0))
    assert second.device_s == pytest.approx(0.3)
    # Two works went ahead of the third, and the second's has nothing to do with it.
    assert (third.compute_ms, third.ahead_ms) == pytest.approx((100.0, 200.0))


async def test_an_engine_is_full_at_its_border_and_has_room_when_a_stream_ends(
    engine: Engine,
) -> None:
    async with (
        aclosing(engine.edit(replaced(session="a"), Source().take)) as a,
        aclosing(engine.edit(replaced(session="b"), Source().take)) as b,
    ):
        await anext(a)
        await anext(b)
        with pytest.raises(WireError) as raised:
            await events(engine, replaced(session="c"))
        assert raised.value.code == "at_capacity"
        assert len(engine.capacity.loads) == 2
        await a.aclose()
        ready, *_ = await events(engine, replaced(session="c"), work(0, 0, 0, last=True))
        assert isinstance(ready, Ready)


async def test_a_stream_that_fails_frees_its_place(engine: Engine) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken weights")

    engine.editor.vae.decode = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="broken weights"):
        await events(engine, OPENING, *WORKS)
    assert engine.capacity.loads == {}
    engine.on.check()  # a stream's failure is not the device's


async def test_a_stream_that_cannot_be_weighed_frees_its_place(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(engine.capacity, "decide", fail)
    with pytest.raises(IndexError):
        await events(engine, OPENING, *WORKS)
    assert (engine.capacity.loads, engine.sessions) == ({}, 0)


async def test_a_broken_device_makes_the_engine_unhealthy(engine: Engine) -> None:
    def fail(*_: Any) -> None:
        raise torch.AcceleratorError("illegal memory access")

    engine.on.check()
    engine.editor.vae.decode = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(torch.AcceleratorError):
        await events(engine, OPENING, *WORKS)
    with pytest.raises(RuntimeError, match="broken: illegal memory access"):
        engine.on.check()


@pytest.mark.parametrize(("cost", "limit"), [(0.1, 120.0), (25.0, 250.0)])
async def test_a_chunk_that_never_ends_makes_the_engine_unhealthy(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, cost: float, limit: float
) -> None:
    """After two minutes, or ten times what it is thought to cost: a long chunk is not stuck."""
    gate, inside = threading.Event(), threading.Event()
    decode = engine.editor.vae.decode

    def stand(*args: Any, **named: Any) -> Any:
        inside.set()
        gate.wait(20)
        return decode(*args, **named)

    engine.editor.vae.decode = stand  # type: ignore[method-assign, assignment]
    engine.capacity.observe(SIZES, cost)
    session = asyncio.create_task(events(engine, OPENING, *WORKS))
    while not inside.is_set():
        await asyncio.sleep(0.001)
    waiting = asyncio.create_task(engine.scheduler.run(int, due=0.0))
    await asyncio.sleep(0)
    metrics = EditorMetrics()
    engine.on.gauge(metrics, engine.chunk_s)
    assert metrics.registry.get_sample_value("liveedit_editor_queue") == 1
    since = engine.scheduler.running_since
    assert since is not None
    monkeypatch.setattr("time.monotonic", lambda: since + limit - 0.1)
    engine.on.check()  # it may take a while
    monkeypatch.setattr("time.monotonic", lambda: since + limit + 0.1)
    with pytest.raises(RuntimeError, match=f"running for more than {limit:g} s"):
        engine.on.check()
    monkeypatch.undo()
    # Its session is over, so that it does not do the same to the next editor.
    with pytest.raises(WireError, match="running for more than") as raised:
        await asyncio.wait_for(session, 20)
    assert raised.value.code == "internal"
    assert len(engine.capacity.loads) == 1  # what still takes the accelerator is counted
    gate.set()
    await waiting
    while engine.capacity.loads:
        await asyncio.sleep(0.01)
    engine.on.check()


async def test_the_gauges_say_what_is(engine: Engine) -> None:
    metrics = EditorMetrics()
    cost = engine.warm_up()
    assert cost > 0
    async with aclosing(engine.edit(replaced(session="a", fps=1.0), Source().take)) as stream:
        await anext(stream)
        engine.on.gauge(metrics, engine.chunk_s)
        value = metrics.registry.get_sample_value
        assert value("liveedit_editor_sessions") == 1
        assert value("liveedit_editor_load") == pytest.approx(engine.capacity.load) != 0
        assert value("liveedit_editor_chunk_seconds") == pytest.approx(cost)
        assert value("liveedit_editor_queue") == 0
        for _ in range(2):  # as often as it is asked
            engine.on.gauge(metrics, engine.chunk_s)
            busy = value("liveedit_editor_busy_seconds_total")
            assert busy == pytest.approx(engine.scheduler.busy_s) != 0
        assert value("liveedit_sessions_on_rung", {"rung": "full"}) == 1
    engine.on.gauge(metrics, engine.chunk_s)
    assert value("liveedit_editor_sessions") == 0
    for rung in NAMES:  # also of one on which somebody was
        assert value("liveedit_sessions_on_rung", {"rung": rung}) == 0


async def test_a_model_is_described(engine: Engine) -> None:
    engine.capacity.observe(Sizes((64, 96), (64, 96)), 0.123456)
    told = engine.describe()
    assert told == {
        "name": "known", "width": 96, "height": 64, "fps": engine.editor.settings.fps,
        "chunk_frames": 12, "first_chunk_frames": 9, "steps": 4, "device": "cpu",
        "chunk_seconds": 0.1235, "frame_seconds": 0.0, "card": {"name": "known"},
    }  # fmt: skip


async def test_who_cannot_be_kept_is_told_so_and_others_stay(engine: Engine) -> None:
    engine.capacity.costs[SIZES] = 5.0  # a chunk lasts 1 s
    engine.capacity._calm = Calm(over=-math.inf)
    with pytest.raises(WireError, match="cannot keep up with this session") as raised:
        await events(engine, replaced(mode="live"), *WORKS)
    assert (raised.value.code, raised.value.retry_after_s) == ("too_slow", 5.0)
    async with asyncio.timeout(20):  # for the job that it has on the accelerator
        while engine.capacity.loads:
            await asyncio.sleep(0.01)
    engine.capacity.costs[SIZES] = 3.9
    assert isinstance((await events(engine, replaced(mode="live"), *WORKS))[-1], Edited)


async def test_a_streams_chunks_are_edited_and_counted_on_its_rung(engine: Engine) -> None:
    lower = replace(SIZES, sparing=True, halved=True)
    engine.capacity.costs[SIZES] = engine.capacity.warm[SIZES] = 1.2
    engine.capacity.warm[replace(lower, halved=False)] = 1.2
    engine.capacity.warm[lower] = 0.6
    found = await events(engine, replaced(mode="live"), *chunks(filling(engine) + 1))
    first = next(event for event in found if isinstance(event, Edited))
    assert (first.rung, first.steps, first.work_size) == ("steps", 2, "48x32")
    assert engine.capacity.costs[SIZES] == 1.2
    assert lower in engine.capacity.costs


async def test_a_stream_is_opened_as_its_client_asks(engine: Engine) -> None:
    """All of it: of most of these an edit that nobody compares would say nothing."""
    opening = replace(OPENING, prompt=BLUE, seed=11, work_size="32x16", detail="source")
    stream = _open(engine.editor, opening)
    state = stream.snapshot(compact=True)
    assert (state.prompt, state.seed, state.detail) == (BLUE, 11, "source")
    sizes = (state.height, state.width, state.work_height, state.work_width)
    assert sizes == (32, 48, 16, 32)
