"""The hub's own part: who reports, who is gone, who has to stop."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from serve.hub import hub
from serve.hub.hub import GONE_S, Hub, HubStore, Report
from serve.hub.records import Entry, Header, Progress
from serve.metrics import Metrics
from serve.wire.protocol import WireError
from serve.wire.work import Opening, Ready

pytestmark = pytest.mark.anyio

HEADER = Header(Opening("s", "red", 48, 32, 16.0, "lossless"), "jpeg", Ready("m", 12, 9, 0))
PROGRESS = Progress(9, 9, "red", "red", b"state")
MODEL = {"name": "m version 3", "width": 48}


@pytest.fixture
async def actor() -> AsyncIterator[Hub]:
    made = Hub("app", 60.0)
    yield made
    made._watching.cancel()


def report(process: str, model: dict[str, Any] | None = None) -> Report:
    metrics = Metrics()
    metrics.frames.inc(len(process))
    return Report(process, metrics.snapshot(), model)


async def test_models_are_counted_by_the_editors_that_hold_them(actor: Hub) -> None:
    for process, model in (("a", MODEL), ("b", MODEL), ("c", {"name": "old"}), ("front", None)):
        await actor.report(report(process, model))
    await actor.report(report("a", MODEL))  # again: still one editor
    assert await actor.models() == [{**MODEL, "editors": 2}, {"name": "old", "editors": 1}]
    assert set(await actor.snapshots()) == {"a", "b", "c", "front"}
    assert "editors" not in MODEL


async def test_who_does_not_report_is_gone(actor: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("serve.hub.hub.time", SimpleNamespace(monotonic=lambda: now))
    await actor.report(report("a", MODEL))
    now += GONE_S - 1
    await actor.report(report("b", MODEL))
    assert (await actor.models())[0]["editors"] == 2
    now += 2
    assert (await actor.models())[0]["editors"] == 1
    assert set(await actor.snapshots()) == {"b"}


async def test_a_replica_hears_that_it_has_to_stop(actor: Hub) -> None:
    actor._stopping = {"a"}
    assert await actor.report(report("a"))
    assert not await actor.report(report("b"))


async def test_sessions_are_those_of_the_store(actor: Hub) -> None:
    token = await actor.create(HEADER)
    assert actor.store.commit(token, 0, HEADER, PROGRESS, [Entry(0, b"image")])
    assert (await actor.claim(token, 0)).epoch == 1
    assert await actor.beat([(token, 0)]) == [token]
    await actor.release(token, 1, True)
    with pytest.raises(WireError):
        await actor.claim(token, 0)
    assert (await actor.commits()).port == (await actor.commits()).port


async def test_a_session_goes_on_while_the_hub_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its progress is not kept, and nobody takes it away."""

    class Down:
        def __getattr__(self, name: str) -> Any:
            async def remote(*_: Any) -> Any:
                raise ActorUnavailableError("starting", None)

            return SimpleNamespace(remote=remote)

    monkeypatch.setattr(hub, "hub_actor", lambda *_: Down())
    store = HubStore("app", 60.0)
    assert await store.commit("token", 0, HEADER, PROGRESS, []) is True
    assert await store.beat([("token", 0)]) == []
    await store.release("token", 0)
    with pytest.raises(ActorUnavailableError):
        await store.create(HEADER)
