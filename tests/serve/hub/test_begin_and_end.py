"""How a hub begins, is found, and ends."""

from __future__ import annotations

import asyncio
import time
from dataclasses import fields, make_dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from serve.admission.admission import Editor, Request, Seat
from serve.hub import client
from serve.hub import hub as hub_module
from serve.hub.hub import ALONE_S, GATHER_S, NAMESPACE, SETTLE_S, Hub, Report, hub_name
from serve.hub.placement import Full, Waiting
from serve.wire.protocol import WireError
from tests.serve.hub.test_hub import SERVES, SETTINGS, SIZES, actor, report

__all__ = ["actor"]  # a fixture

pytestmark = pytest.mark.anyio


def test_another_version_of_the_code_does_not_find_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would understand neither reports nor commits."""
    name = hub_name("app")
    assert name.startswith("hub-app-")
    assert name != hub_name("another")
    said = [(field.name, field.type) for field in fields(Report)]
    assert make_name(said, monkeypatch) == name
    # One that has other fields, or the same with another meaning.
    assert make_name(said[:1], monkeypatch) != name
    assert make_name([(said[0][0], "int"), *said[1:]], monkeypatch) != name
    monkeypatch.undo()
    assert hub_name("app") == name
    told = "Report Orders Record Editor Request Placed Waiting Full Retired ServeSettings Limits"
    for kind in told.split():
        with monkeypatch.context() as patched:
            patched.setattr(hub_module, kind, make_dataclass(kind, ["another"]))
            assert hub_name("app") != name, kind


def make_name(said: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("serve.hub.hub.Report", make_dataclass("Report", said))
    return hub_name("app")


def test_an_application_has_one_hub_which_outlives_who_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    class Remote:
        def options(self, **options: Any) -> Remote:
            asked.update(options)
            return self

        def remote(self, *told: Any) -> tuple[Any, ...]:
            return told

    monkeypatch.setattr(client, "ray", SimpleNamespace(remote=lambda kind: Remote()))
    assert client.hub_actor("app", SETTINGS, SERVES) == ("app", SETTINGS, SERVES)
    assert (asked["name"], asked["namespace"]) == (hub_name("app"), NAMESPACE)
    assert (asked["get_if_exists"], asked["lifetime"]) == (True, "detached")
    assert asked["max_restarts"] == -1
    assert asked["max_concurrency"] > 100  # each process waits for a few answers
    assert asked["num_cpus"] == 0  # a machine that is full has one all the same


async def test_a_new_hub_sends_nobody_away_before_it_has_heard_of_all(actor: Hub) -> None:
    """It may be one in place of another, of which fronts and editors tell it within seconds."""
    now = time.monotonic()
    actor._placement._clock = actor.store._clock = lambda: now
    full = Editor("a", 12, 1, {"x": Seat("s", 0.1)})
    asked = Request("y", "t", SIZES, 16.0)
    for after, answer in ((0.0, Waiting), (SETTLE_S - 0.1, Waiting), (0.2, Full)):
        now += after
        await actor.report(replace(report("a", {}), editor=full))
        assert isinstance(await actor.part("places", "ask", [asked], {}), answer)
    for after, code in ((GATHER_S - SETTLE_S - 1.0, "at_capacity"), (60.0, "bad_request")):
        now += after
        with pytest.raises(WireError) as raised:
            await actor.part("store", "claim", ["token", 0], {})
        assert raised.value.code == code


async def test_a_hub_that_nobody_reports_to_ends_for_good(
    actor: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, killed = time.monotonic(), list[Any]()
    asked = asyncio.Event()
    monkeypatch.setattr(hub_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(hub_module, "WATCH_S", 0.0)
    monkeypatch.setattr(hub_module, "serve_replicas", lambda app: [])
    monkeypatch.setattr(hub_module.asyncio, "to_thread", lambda *_: heard())
    here = SimpleNamespace(current_actor="it")
    monkeypatch.setattr(hub_module.ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(hub_module.ray, "kill", lambda it, **how: killed.append((it, how)))

    async def heard() -> list[Any]:
        asked.set()
        return []

    await actor.report(report("a"))
    watching = asyncio.create_task(actor._watch())
    async with asyncio.timeout(20):
        for _ in range(2):
            now += ALONE_S - 0.1
            asked.clear()
            await asked.wait()
            await actor.report(report("a"))  # as long as somebody does
        now += ALONE_S
        await watching
    assert killed == [("it", {"no_restart": True})]
