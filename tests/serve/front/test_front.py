"""The front's HTTP routes, and what a session is told when something of ours fails."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.front.front import Codecs, Front
from serve.metrics import Metrics
from serve.tenants import Tenants
from serve.wire.protocol import WireError
from tests.serve.front.world import OPEN, StoreLink, World, frames
from tests.serve.tokens import write_tokens


def get(world: World, front: Front, path: str, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(front.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.get(path, headers=headers)

    return world.clock.run(ask())


def a_front(world: World) -> Front:
    return world.front(StoreLink(world.store, world))


def test_images_in_the_codecs_are_counted() -> None:
    metrics, gate = Metrics(), threading.Event()
    value = metrics.registry.get_sample_value
    with Codecs(metrics) as codecs:
        work = [codecs.submit(gate.wait, 10) for _ in range(50)]
        assert value("liveedit_codec_queue") == 50
        gate.set()
        wait(work)
    assert value("liveedit_codec_queue") == 0


def test_a_front_that_leaves_lives_and_is_not_ready() -> None:
    with World() as world:
        front = a_front(world)
        assert get(world, front, "/readyz").json() == {"status": "ready"}
        front.leave()
        assert get(world, front, "/healthz").status_code == 200
        answer = get(world, front, "/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


@pytest.mark.parametrize(("retry", "header"), [(5.0, "5"), (None, None)])
def test_no_warm_editor_is_503_with_the_time_to_come_back(
    retry: float | None, header: str | None
) -> None:
    async def models() -> list[dict[str, Any]]:
        raise WireError("at_capacity", "no editor is warmed up yet", retry)

    async def down() -> list[dict[str, Any]]:
        raise WireError("internal", "the server's records do not answer")

    with World() as world:
        front = a_front(world)
        front._models = down
        for path in ("/readyz", "/v1/models"):  # whatever it is: not now
            assert get(world, front, path).status_code == 503
        front._models = models
        for path in ("/readyz", "/v1/models"):
            answer = get(world, front, path)
            assert answer.status_code == 503
            assert answer.json()["error"] == {
                "code": "at_capacity", "message": "no editor is warmed up yet",
            }  # fmt: skip
            assert answer.headers.get("retry-after") == header
        assert get(world, front, "/healthz").status_code == 200


def test_tokens_guard_everything_below_v1(tmp_path: Path) -> None:
    tenants = Tenants(str(write_tokens(tmp_path / "tokens")))
    with World(tenants=tenants) as world:
        front = a_front(world)
        for path in ("/v1/models", "/v1/edits", "/v1/anything", "/v1/"):
            for headers in ({}, {"authorization": "Bearer secre"}):
                answer = get(world, front, path, **headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "unauthorized"
        assert get(world, front, "/v1/models", authorization="Bearer secret").status_code == 200
        assert get(world, front, "/v1/models?token=secret").status_code == 200
        for path in ("/healthz", "/readyz", "/metrics"):
            assert get(world, front, path).status_code == 200


def test_metrics_are_of_every_process() -> None:
    with World() as world:
        world.connect(OPEN)
        front = a_front(world)
        text = get(world, front, "/metrics").text
        who = 'model="known",process="front",tenant="everybody"'
        assert f"liveedit_sessions_admitted_total{{{who}}} 1.0" in text
        assert 'liveedit_sessions{process="front"} 1.0' in text


def test_what_fails_here_is_internal_and_tells_no_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(*_: Any) -> bool:
        raise RuntimeError("/secret/path")

    with World() as world:
        wire = world.connect(OPEN)
        monkeypatch.setattr(StoreLink, "commit", broken)
        for data in frames(0, 9):
            wire.say(data)
        world.settle()
        assert wire.messages[-1] == {
            "type": "error", "code": "internal", "message": "the server failed; its log says why",
        }  # fmt: skip
        assert (wire.code, wire.frames) == (1011, [])
        assert world.sample("sessions_ended_total", reason="internal") == 1
        monkeypatch.undo()
        back = world.connect(OPEN | {"resume": wire.messages[0]["resume"], "received": 0})
        assert back.messages[0]["next_frame"] == 0


def test_editors_that_die_before_they_take_a_session_are_no_room() -> None:
    """For ten seconds another one is asked."""
    with World() as world:
        world.editors.stillborn = True
        wire = world.connect(OPEN)
        world.advance(9.5)
        assert wire.code is None
        world.advance(3.0)
        assert (wire.messages[0]["code"], wire.code) == ("at_capacity", 1013)
        assert wire.messages[0]["retry_after_s"] == 5.0
        assert len(world.store) == 0
        late = world.connect(OPEN)
        world.editors.stillborn = False
        world.advance(2.0)
        assert late.messages[0]["type"] == "opened"
        assert world.sample("sessions_moved_total", why="death") == 0
