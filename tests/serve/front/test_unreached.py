"""What a front makes of editors that it cannot reach, while Ray and the hub know nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from serve.admission.admission import Request
from serve.front import ray_backend
from serve.front.ray_backend import TRIES, RayBackend
from serve.hub.placement import Answer, Placed
from serve.wire.protocol import WireError
from serve.wire.work import EditorEvent, EditorLostError, Opening, Take
from tests.serve.front.on_ray import (
    OPENING,
    READY,
    Editor,
    Handle,
    Hub,
    good,
    listener,
    raising,
    replica,
    run,
    silent,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("soon")]


async def test_an_editor_that_does_not_answer_is_passed_over_and_avoided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its machine may be gone, of which neither Ray nor the hub have heard."""
    monkeypatch.setattr(ray_backend, "OPEN_S", 0.1)
    hub = Hub("ab")
    (ready, *_), handle = await run(silent, good, hub=hub)
    assert ready == READY
    assert handle.chosen == ["a", "b"]
    assert [asked.avoid for asked in hub.asked] == [frozenset(), {"a"}]


async def test_the_only_editor_is_tried_twice_where_it_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever is avoided and comes up again stands for all others."""
    monkeypatch.setattr(ray_backend, "OPEN_S", 0.05)
    hub = Hub("a")
    with pytest.raises(WireError, match="every editor is busy"):
        await run(silent, hub=hub)
    assert [asked.avoid for asked in hub.asked] == [frozenset(), {"a"}]


async def test_of_many_editors_that_do_not_answer_a_few_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each costs who waits several seconds."""
    monkeypatch.setattr(ray_backend, "OPEN_S", 0.02)
    hub = Hub("abcdef")
    with pytest.raises(WireError, match="every editor is busy"):
        await run(silent, hub=hub)
    assert [len(asked.avoid) for asked in hub.asked] == list(range(TRIES))


async def test_an_editor_that_was_reached_may_take_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A busy one that restores a session: to begin anew elsewhere would take as long again."""
    monkeypatch.setattr(ray_backend, "OPEN_S", 0.8)

    class Slow(Editor):
        async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
            await asyncio.sleep(0.9)
            async for event in super().edit(opening, take):
                yield event

    (ready, *_), handle = await run(replica(Slow()), good, hub=Hub("ab"))
    assert ready == READY
    assert handle.chosen == ["a"]
    monkeypatch.setattr(ray_backend, "READY_S", 0.1)  # but not all of it
    _, handle = await run(replica(Slow()), good, hub=Hub("ab"))
    assert handle.chosen == ["a", "b"]


async def test_an_editor_that_was_lost_is_avoided_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(ray_backend, "time", SimpleNamespace(monotonic=lambda: now))
    hub, handle = Hub("ab"), Handle(raising(ActorDiedError(), after=0), good)
    backend = RayBackend(handle, listener(), hub)  # type: ignore[arg-type]

    async def stream() -> None:
        async with aclosing(backend.edit(OPENING, asyncio.Event().wait)) as events:  # type: ignore[arg-type]
            assert await anext(events) == READY
            await anext(events)

    with pytest.raises(EditorLostError):
        await stream()
    for later in (0.0, 9.9, 10.0):
        now = 100.0 + later
        opening = backend.edit(OPENING, asyncio.Event().wait)  # type: ignore[arg-type]
        assert await anext(opening) == READY
        await opening.aclose()
    assert handle.chosen == ["a", "b", "b", "a"]
    backend.listener.close()


async def test_without_a_hub_any_editor_does_but_those_that_were_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_backend, "OPEN_S", 0.1)
    for replicas, chosen in (
        ((silent, good), ["a", "-a"]),
        ((silent, silent, good), ["a", "-a", "-a"]),  # of one without a name none is avoided
    ):
        hub = Hub("ab")
        ask = hub.ask

        async def away(request: Request, ask: Any = ask) -> Answer:
            answer: Answer = await ask(request)
            return Placed("") if request.avoid else answer

        hub.ask = away  # type: ignore[method-assign]
        _, handle = await run(*replicas, hub=hub)
        assert handle.chosen == chosen
