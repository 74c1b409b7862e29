"""Every message of errors.js and source.js, reached in Chromium as a person would reach it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from selenium.webdriver import Chrome
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from serve.front.front import SAMPLES, WEB
from serve.limits import Limits
from serve.tenants import PROTOCOL
from tests.serve.conftest import Server, serving
from tests.serve.page.browser import FAKE_CAMERA, Page, chromium
from tests.serve.tokens import write_tokens

pytestmark = pytest.mark.slow
SERVER = {  # what a server that really runs is brought to say, by the tests below
    "unauthorized", "at_capacity", "unsupported_size", "stopped", "unreachable",
    "spent",
}  # fmt: skip
SAID = {"draining": "restarted", "too_slow": "too slow", "internal": "had a problem"}
CAMERA = {"NotAllowedError", "NotFoundError", "NotReadableError", "OverconstrainedError"}


@contextmanager
def refusing() -> Iterator[str]:
    """A server whose every session ends with the error that its token names; `waiting` waits in a
    queue until the client has had enough, and `lowered` is edited less well from there on."""

    async def models(request: Request) -> JSONResponse:
        model = {"name": "none", "device": "cpu", "width": 48, "height": 32, "fps": 16}
        chunks = {"chunk_frames": 12, "first_chunk_frames": 9, "chunk_seconds": 0.1}
        sizes = {"work_size": "native", "frame_seconds": 0.0, "max_work_pixels": 921600}
        limits = {"max_side": 1920, "max_pixels": 921600}
        return JSONResponse({"models": [model | chunks | sizes | limits]})

    async def stream(channel: WebSocket) -> None:
        await channel.accept(subprotocol="liveedit.v1")
        await channel.receive_text()
        code = channel.scope["subprotocols"][1].removeprefix(PROTOCOL)
        if code == "waiting":
            for place in (3, 2):
                await channel.send_json(
                    {"type": "queued", "place": place, "expected_s": 3.2 * place}
                )
            await channel.receive_text()
        if code == "lowered":
            for level in ("steps", "full", "size"):
                quality = {"level": level, "first_frame": 0, "work_size": "416x240", "steps": 2}
                await channel.send_json({"type": "quality", **quality})
            await channel.receive()
        await channel.send_json({"type": "error", "code": code, "message": "as asked"})
        await channel.close(1011)

    app = Starlette(
        routes=[
            Route("/v1/models", models),
            WebSocketRoute("/v1/stream", stream),
            Mount("/samples", StaticFiles(directory=SAMPLES)),
            Mount("/", StaticFiles(directory=WEB, html=True)),
        ]
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def test_the_messages_are_those_that_are_reached_here(browser: Chrome, server: Server) -> None:
    Page(browser, server.http).loaded()
    codes, names = browser.execute_async_script(
        "import('./errors.js').then((m) => "
        "arguments[0]([Object.keys(m.CODES), Object.keys(m.NAMES)]))"
    )
    assert set(codes) == SERVER | set(SAID)
    assert set(names) == CAMERA


@pytest.mark.parametrize(("code", "words"), SAID.items())
def test_a_server_that_gives_a_session_up(browser: Chrome, code: str, words: str) -> None:
    with refusing() as url:
        page = Page(browser, url, f"?token={code}")
        page.loaded()
        page["prompt"].send_keys("make it blue")
        # A server that restarts is asked for 20 s: let them be over after the first refusal.
        browser.execute_script(
            "const now = performance.now.bind(performance); let asked = 0;"
            "performance.now = () => now() + (asked++ > 5 ? 60000 : 0);"
        )
        page["start"].click()
        assert words in page.complaint()
        assert page["retry"].is_displayed() is (code != "too_slow")
        page.ready()


def test_a_place_in_the_queue_is_told_until_one_has_had_enough(browser: Chrome) -> None:
    with refusing() as url:
        page = Page(browser, url, "?token=waiting")
        page.loaded()
        page["prompt"].send_keys("make it blue")
        page["start"].click()
        page.until(lambda: page["state"].text == "waiting, place 2", "no word of the queue")
        assert page["note"].text == "All places are taken. You are number 2: about 7 s."
        assert page.barriers() == []
        page["start"].click()
        page.ready()
        browser.execute_script("sessionStorage.clear()")


def test_a_session_that_is_edited_less_well_is_told_so_in_words(browser: Chrome) -> None:
    with refusing() as url:
        page = Page(browser, url, "?token=lowered")
        page.loaded()
        page["prompt"].send_keys("make it blue")
        assert page["quality"].text == ""
        page["start"].click()
        page.until(lambda: page["quality"].text != "", "no word of it")
        assert page["quality"].text == "smaller working size, 416x240: the server is busy"
        assert page.barriers() == []
        page["start"].click()
        page.ready()
        assert page["quality"].text == "", "said when nothing is edited"
        browser.execute_script("sessionStorage.clear()")


def test_another_refusal_is_said_in_the_servers_words(browser: Chrome, small_model: Path) -> None:
    with serving(small_model, limits=Limits(max_prompt=3)) as strict:
        page = Page(browser, strict.http)
        page.loaded()
        page["prompt"].send_keys("make it blue")
        page["start"].click()
        assert page.complaint().startswith("The server refused: the prompt has")
        assert not page["retry"].is_displayed()


def test_a_token_is_asked_for(browser: Chrome, small_model: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens")
    with serving(small_model, token_file=str(tokens)) as guarded:
        page = Page(browser, guarded.http)
        page.until(lambda: page["model"].text == "needs a token", "no word of the token")
        page["prompt"].send_keys("make it blue")
        page["start"].click()
        assert "asks for a token" in page.complaint()
        page = Page(browser, guarded.http, "?token=secret&x=1")
        page["prompt"].send_keys("make it blue")
        page.start()
        page.more(9)
        page.stop()
        assert browser.current_url == f"{guarded.http}/?x=1"
        browser.refresh()
        page.loaded()  # the tab remembers it
        browser.execute_script("sessionStorage.clear()")
        page = Page(browser, guarded.http, "#token=secret")
        page.loaded()
        assert "secret" not in browser.current_url
        browser.execute_script("sessionStorage.clear()")


def test_minutes_that_are_used_up(
    browser: Chrome, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.front.front.HOLDER_BEAT_S", 0.2)
    tokens = write_tokens(tmp_path / "tokens", minutes_per_day=0.005)
    with serving(small_model, token_file=str(tokens)) as guarded:
        page = Page(browser, guarded.http, "#token=secret")
        page.loaded()
        page["prompt"].send_keys("make it blue")
        page["start"].click()
        assert "minutes of your token are used up" in page.complaint()
        browser.execute_script("sessionStorage.clear()")


def test_a_size_that_the_server_does_not_take(browser: Chrome, small_model: Path) -> None:
    with serving(small_model, limits=Limits(max_side=32)) as small:
        page = Page(browser, small.http)
        page.loaded()
        page["prompt"].send_keys("make it blue")
        browser.execute_script("document.getElementById('width').value = 100")
        page["start"].click()
        assert "cannot edit frames of this size" in page.complaint()
        browser.execute_script("document.getElementById('width').value = 9000")
        page["start"].click()
        assert page["width"].is_displayed(), "the field that is wrong stays hidden"
        assert browser.switch_to.active_element == page["width"]


def test_a_server_that_stops_and_then_is_gone(browser: Chrome, small_model: Path) -> None:
    with serving(small_model) as ending:
        page = Page(browser, ending.http)
        page["prompt"].send_keys("make it blue")
        page.start()
        page.more(9)
        ending.call(ending.front.stop)
        assert "was stopped" in page.complaint()
        page.ready()
    page["retry"].click()
    assert "cannot be reached" in page.complaint()
    page.ready()


def reject(name: str) -> str:
    return (
        "navigator.mediaDevices.getUserMedia = () => "
        f"Promise.reject(new DOMException('words of the browser', '{name}'))"
    )


def test_a_camera_that_another_program_has(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.loaded()
    browser.execute_script(reject("NotReadableError"))
    page.choose("from", "camera")
    assert "in use by another program" in page.complaint()
    assert page.chosen("from") == "sample", "what was chosen before goes on"
    assert page["play"].is_displayed()


def test_a_camera_that_is_gone(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.loaded()
    browser.execute_script(
        "document.getElementById('device').add(new Option('old', 'f'.repeat(64)))"
    )
    page.choose("from", "camera")
    assert "is gone" in page.complaint()


def no_device(browser: Chrome) -> None:
    del browser


def denied(browser: Chrome) -> None:
    permission = {"permission": {"name": "camera"}, "setting": "denied"}
    browser.execute_cdp_cmd("Browser.setPermission", permission)


@pytest.mark.parametrize(
    ("arguments", "before", "words"),
    [
        ((FAKE_CAMERA[0],), denied, "was not allowed"),
        (("--use-fake-ui-for-media-stream",), no_device, "No camera was found"),
    ],
)
def test_no_camera(
    server: Server, arguments: tuple[str, ...], before: Callable[[Chrome], None], words: str
) -> None:
    with chromium(*arguments) as browser:
        before(browser)
        page = Page(browser, server.http)
        page.loaded()
        page.choose("from", "camera")
        assert words in page.complaint()
        assert page.barriers() == []


def test_without_https_there_is_no_camera(server: Server) -> None:
    with chromium("--host-resolver-rules=MAP liveedit.test 127.0.0.1") as browser:
        page = Page(browser, f"http://liveedit.test:{server.port}")
        page.loaded()
        page.choose("from", "camera")
        assert "only over https" in page.complaint()


def test_a_file_is_missing_or_no_video(browser: Chrome, server: Server, tmp_path: Path) -> None:
    page = Page(browser, server.http)
    page.loaded()
    page.choose("from", "file")
    assert page["note"].text == "choose a video file"
    assert not page["play"].is_displayed()
    assert not page["error"].is_displayed(), "nothing is wrong yet"
    page["start"].click()
    assert page.complaint() == "Choose a video file first."
    assert page["state"].text == "ready", "the sample was started in place of a file"
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    page["file"].send_keys(str(broken))
    page.until(lambda: "cannot play" in page["error-text"].text, "no word of the file")
