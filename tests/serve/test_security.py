"""The threats of docs/security.md against a server that runs: each has its test here, or says where
it is."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from modeling.model_dir import read_card
from serve.front.door import HEADERS
from serve.limits import Limits
from tests.serve.conftest import Server, clip, serving
from tests.serve.front.test_http import post, stamped, video
from tests.serve.models import save_small_model
from tests.serve.test_robustness import OPEN
from tests.serve.tokens import write_tokens
from tests.serve.wire.test_wire import binary, hear, hear_all, say, socket

ROOT = Path(__file__).parents[2]
PATH = re.compile(r"(?<![\w<:/.])/(tmp|home|root|work|usr|mnt|etc|var|opt)/|_io\.|0x[0-9a-f]{6}")


@pytest.fixture(scope="module")
def carded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model's card names places of the machine that trained it."""
    model = save_small_model(tmp_path_factory.mktemp("model") / "small")
    card = read_card(model) | {
        "parent": {"path": "/home/trainer/runs/parent"}, "dataset": {"uri": "s3://secret/pairs"},
        "config": {"note": "/mnt/private"},
    }  # fmt: skip
    (model / "card.json").write_text(json.dumps(card))
    with serving(model, Limits(max_video_frames=30)) as running:
        yield running


@pytest.mark.parametrize("path", ["/", "/app.js", "/v1/models", "/absent", "/metrics", "/healthz"])
def test_every_answer_says_what_a_browser_may_do_with_it(server: Server, path: str) -> None:
    answer = httpx.get(server.http + path)
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/edits"), ("POST", "/v1/edit"), ("GET", "/v1/stream")]
)
def test_an_address_that_is_none_is_told_which_are(server: Server, method: str, path: str) -> None:
    answer = httpx.request(method, server.http + path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == (
        f"there is no {method} {path}; there are GET /v1/models, POST /v1/edits and a WebSocket at "
        "/v1/stream"
    )


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    for path in ("/", "/app.js", "/wire.js", "/style.css"):
        text = httpx.get(server.http + path).text
        linked = re.findall(r"""(?:src|href|from|url\()\s*=?\s*["']([^"']+)""", text)
        assert not [link for link in linked if re.match(r"(https?:)?//", link)], path
        assert not re.search(r"\son\w+=", text), f"{path} has a handler in its markup"


def test_a_models_list_names_no_paths(carded: Server) -> None:
    text = httpx.get(f"{carded.http}/v1/models").text
    for told in ("trainer", "secret", "private"):
        assert told not in text
    assert not PATH.search(text)


@pytest.mark.parametrize("path", ["/../../../etc/passwd", "/%2e%2e/%2e%2e/pyproject.toml", "//etc"])
def test_files_beside_the_page_are_not_served(server: Server, path: str) -> None:
    request = httpx.Request("GET", httpx.URL(server.http).copy_with(raw_path=path.encode()))
    with httpx.Client() as client:
        answer = client.send(request)
    assert answer.status_code in (307, 404)
    assert "root:" not in answer.text


def test_errors_of_uploads_name_no_paths(carded: Server, tmp_path: Path) -> None:
    long = stamped(tmp_path / "long.mkv", list(range(40)))
    cut = video(clip(20))[:-2000]
    for data, fields in (
        (b"not a video", {"prompt": "x"}), (b"", {"prompt": "x"}), (cut, {"prompt": "x"}),
        (video(clip(2)), {"prompt": "x" * 5000}), (video(clip(2)), {"prompt": "x", "seed": "/tmp"}),
        (long, {"prompt": "x"}), (b"ffconcat version 1.0\nfile /etc/passwd\n", {"prompt": "x"}),
        (video(clip(2)), {"prompt": "x", "model": "/etc"}),
    ):  # fmt: skip
        answer = post(carded, data, **fields)
        assert answer.status_code == 400, answer.text
        text = answer.json()["error"]["message"].replace("'/tmp'", "")
        assert not PATH.search(text), text


@pytest.mark.parametrize("image", [b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", b"x" * 100])
@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_errors_of_frames_name_no_paths(server: Server, image: bytes, format: str) -> None:
    with socket(server) as connection:
        say(connection, **OPEN | {"format": format})
        assert hear(connection)["type"] == "opened"
        connection.send(binary(0, image))
        error: Any = hear_all(connection)[0]
    assert error["code"] == "bad_frame"
    assert not PATH.search(error["message"]), error["message"]


def test_a_failure_of_ours_says_nothing_of_us(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(small_model) as server:

        def fail(opening: Any) -> str:
            raise RuntimeError("/home/secret/weights broke")

        monkeypatch.setattr(server.engine.capacity, "admit", fail)
        with socket(server) as connection:
            say(connection, **OPEN)
            error: Any = hear_all(connection)[0]
        assert (error["code"], error["message"]) == (
            "internal", "the server failed; its log says why",
        )  # fmt: skip
        answer = post(server, video(clip(2)), prompt="x")
        assert answer.status_code == 500
        assert "secret" not in answer.text


def test_a_tenants_video_is_a_session_of_its(small_model: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", max_sessions=1)
    header = {"Authorization": "Bearer secret"}
    with serving(small_model, token_file=str(tokens)) as server:
        with socket(server, additional_headers=header) as connection:
            say(connection, **OPEN)
            assert hear(connection)["type"] == "opened"
            files = {"video": ("clip.mp4", video(clip(2)))}
            url = f"{server.http}/v1/edits"
            answer = httpx.post(url, files=files, data={"prompt": "x"}, headers=header, timeout=60)
            assert answer.status_code == 503
            assert "your limit is reached" in answer.json()["error"]["message"]
        for _ in range(100):
            if not server.call(lambda: server.front.services.ledger._sessions):
                break
            time.sleep(0.05)
        answer = httpx.post(url, files=files, data={"prompt": "x"}, headers=header, timeout=60)
        assert answer.status_code == 200


def test_every_threat_names_a_test_that_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
    rows = text[text.index("## Threats") :].splitlines()
    threats = [
        row for row in rows if row.startswith("| ") and not row.startswith(("| a ", "| ---"))
    ]
    assert len(threats) >= 20
    assert all("tests/" in row for row in threats), "a threat without a test"
