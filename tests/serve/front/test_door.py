"""From which pages and with whose token the server is used, over the front's own ASGI interface."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from serve.front.door import Door, Guard
from serve.hub.records import HOLDER_BEAT_S
from serve.tenants import Tenants
from tests.serve.front.test_front import a_front, get
from tests.serve.front.world import OPEN, World, frames
from tests.serve.tokens import write_tokens


def page(world: World, origin: str, host: str) -> str:
    """What a WebSocket from a page hears first."""
    wire = world.connect(OPEN, headers={"origin": origin, "host": host})
    first = wire.messages[0]
    wire.disconnect()
    world.settle()
    if first["type"] == "error":
        assert first["code"] == "unauthorized"
        assert wire.code == 1008
    return str(first["type"])


@pytest.mark.parametrize(
    ("origin", "host", "let_in"),
    [
        ("http://localhost:8000", "localhost:8000", True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("https://192.0.2.1", "192.0.2.1", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        (f"http://{socket.gethostname()}:8000", f"{socket.gethostname()}:8000", True),
        ("https://evil.example", "localhost:8000", False),
        ("http://localhost:9000", "localhost:8000", False),  # another server of this machine
        ("http://localhost.evil.example:8000", "localhost:8000", False),
        ("null", "localhost:8000", False),  # a file, a sandboxed frame
        ("", "", False),
        ("http://[", "[", False),  # no address at all
        # The stranger's name points at this machine: its page and the server look like one place.
        ("http://evil.example:8000", "evil.example:8000", False),
        ("https://app.example", "localhost:8000", True),  # allowed
        ("https://APP.example", "edit.example", True),
        ("http://app.example", "localhost:8000", False),
        ("https://app.example:444", "localhost:8000", False),
    ],
)
def test_pages_from_elsewhere_are_not_let_in(origin: str, host: str, let_in: bool) -> None:
    with World(origins=("https://app.example",)) as world:
        assert page(world, origin, host) == ("opened" if let_in else "error")


@pytest.mark.parametrize("name", ["x-forwarded-host", "x-host", "forwarded"])
def test_a_page_does_not_say_itself_where_it_was_asked_for(name: str) -> None:
    """Only its browser's Host does."""
    headers = {"origin": "http://203.0.113.5", "host": "localhost:8000", name: "203.0.113.5"}
    with World() as world:
        assert world.connect(OPEN, headers=headers).messages[0]["code"] == "unauthorized"


def test_an_allowed_origin_may_be_written_in_any_case() -> None:
    with World(origins=("https://App.Example/",)) as world:
        assert page(world, "https://app.example", "localhost:8000") == "opened"


def test_who_is_no_browser_says_no_origin() -> None:
    with World() as world:
        assert world.connect(OPEN).messages[0]["type"] == "opened"
        assert world.connect(OPEN, headers={"host": "x"}).messages[0]["type"] == "opened"


def test_with_tokens_a_page_may_come_from_the_name_it_was_asked_for(tmp_path: Path) -> None:
    with World(tenants=Tenants(str(write_tokens(tmp_path / "tokens")))) as world:
        headers = {"origin": "https://edit.example", "host": "edit.example"}
        for token, first in ((".secret", "opened"), (".wrong", "error"), ("", "error")):
            protocols = ("liveedit.v1", f"liveedit.token{token}")
            wire = world.connect(OPEN, headers=headers, subprotocols=protocols)
            assert wire.messages[0]["type"] == first


def test_origins_guard_http_too() -> None:
    with World() as world:
        front = a_front(world)
        answer = get(world, front, "/v1/models", origin="https://evil.example")
        assert answer.status_code == 401
        assert "pages from https://evil.example may not" in answer.json()["error"]["message"]
        assert get(world, front, "/healthz", origin="https://evil.example").status_code == 200


def test_the_access_log_has_real_paths_and_no_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with World(tenants=Tenants(str(write_tokens(tmp_path / "tokens")))) as world:
        front = a_front(world)
        get(world, front, "/v1/models?token=secret")
        get(world, front, "/v1/models?token=wrong")
        get(world, front, "/v1/a%0Ab")
        get(world, front, "/v1/" + "a" * 5000)
    lines = [r for r in caplog.records if getattr(r, "event", "") == "request"]
    assert [(r.path, r.status) for r in lines] == [  # type: ignore[attr-defined]
        ("/v1/models", 200), ("/v1/models", 401), ("/v1/a\\nb", 401), ("/v1/" + "a" * 196, 401),
    ]  # fmt: skip
    assert lines[0].getMessage().startswith("GET /v1/models 200 ")
    assert lines[0].client == "127.0.0.1"  # type: ignore[attr-defined]
    for token in ("secret", "wrong"):
        assert not any(token in line.getMessage() for line in lines)


def two(tmp_path: Path, **limits: float) -> Tenants:
    return Tenants(str(write_tokens(tmp_path / "tokens", {"a": "one", "b": "two"}, **limits)))


def test_a_tenant_is_held_to_its_sessions_on_all_fronts(tmp_path: Path) -> None:
    with World(tenants=two(tmp_path, max_sessions=1)) as world:
        first = world.connect(OPEN, query="token=one")
        assert first.messages[0]["type"] == "opened"
        second = world.connect(OPEN, query="token=one")  # `connect` is to a front of its own
        assert (second.messages[0]["code"], second.code) == ("at_capacity", 1013)
        assert "your limit is reached" in second.messages[0]["message"]
        assert world.sample("sessions_refused_total", code="at_capacity", tenant="a") == 1
        assert world.connect(OPEN, query="token=two").messages[0]["type"] == "opened"
        first.disconnect()
        world.settle()
        assert world.connect(OPEN, query="token=one").messages[0]["type"] == "opened"


def test_another_tenants_session_cannot_be_resumed(tmp_path: Path) -> None:
    with World(tenants=two(tmp_path)) as world:
        wire = world.connect(OPEN, *frames(0, 9), query="token=one")
        token = wire.messages[0]["resume"]
        resume = OPEN | {"resume": token, "received": 0}
        thief = world.connect(resume, query="token=two")
        assert thief.messages[0]["code"] == "bad_request"
        assert "resume token is unknown" in thief.messages[0]["message"]
        assert wire.code is None  # whose it is goes on
        assert world.connect(resume, query="token=one").messages[0]["type"] == "opened"


def test_a_withdrawn_token_ends_its_sessions(tmp_path: Path) -> None:
    with World(tenants=two(tmp_path)) as world:
        wires = {name: world.connect(OPEN, query=f"token={name}") for name in ("one", "two")}
        write_tokens(tmp_path / "tokens", {"b": "two"})
        world.advance(HOLDER_BEAT_S)
        heard = wires["one"].messages[-1]
        assert (heard["code"], wires["one"].code) == ("unauthorized", 1008)
        assert wires["two"].code is None
        assert world.sample("sessions_ended_total", reason="unauthorized", tenant="a") == 1


def test_minutes_that_are_used_up_finish_the_session(tmp_path: Path) -> None:
    with World(tenants=two(tmp_path, minutes_per_day=0.5)) as world:
        wire = world.connect(OPEN, *frames(0, 12), query="token=one")
        world.advance(2 * HOLDER_BEAT_S)
        assert wire.messages[-1]["type"] == "chunk"
        world.advance(HOLDER_BEAT_S)
        assert len(wire.frames) == 12  # what had come in is edited
        assert wire.messages[-1] == {"type": "closed", "frames": 12, "reason": "spent"}
        assert wire.code == 1000
        again = world.connect(OPEN, query="token=one").messages[0]
        assert "the 0.5 minutes of today are used" in again["message"]
        assert world.sample("sessions_ended_total", reason="spent", tenant="a") == 1


def test_the_log_says_who_opened_what_from_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with World(tenants=two(tmp_path)) as world:
        wire = world.connect(OPEN, *frames(0, 9), {"type": "close"}, query="token=one")
        world.settle()
        assert wire.code == 1000
        world.connect(OPEN, query="token=three")
        world.connect(OPEN | {"fps": 900}, query="token=two")
    lines = [r.__dict__ for r in caplog.records if getattr(r, "event", "request") != "request"]
    assert [line["event"] for line in lines] == ["opened", "ended", "refused", "refused"]
    opened, ended, stranger, refused = lines
    session = wire.messages[0]["session"]
    for line in (opened, ended):
        assert (line["session"], line["tenant"], line["model"]) == (session, "a", "known")
        assert (line["width"], line["height"], line["fps"]) == (16, 16, 16.0)
        assert line["mode"] == "lossless"
    assert (ended["reason"], ended["frames"]) == ("close", 9)
    assert (stranger["code"], stranger["tenant"]) == ("unauthorized", "nobody")
    assert (refused["code"], refused["tenant"]) == ("bad_request", "b")
    assert {line["client"] for line in lines} == {"198.51.100.7"}


@pytest.mark.anyio
@pytest.mark.parametrize(("begins", "status"), [(False, 500), (True, 206)])
async def test_a_request_that_fails_is_logged_by_what_its_client_saw(
    begins: bool, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The server's own 500, where no answer was begun."""
    caplog.set_level("INFO")

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if begins:
            await send({"type": "http.response.start", "status": 206, "headers": []})
        raise RuntimeError("a defect")

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/healthz", "headers": []}
    with pytest.raises(RuntimeError, match="a defect"):
        await Guard(fails, Door(Tenants()))(scope, send, send)  # type: ignore[arg-type]
    (line,) = (r.__dict__ for r in caplog.records if getattr(r, "event", "") == "request")
    assert (line["status"], line["path"], line["client"]) == (status, "/healthz", "-")
