"""The page in a headless Chromium with a fake camera."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.support.ui import Select

from data.video import VideoWriter, probe, read_frames
from modeling.detail.work_size import in_pixels, unlike_training
from serve.admission.admission import Sizes
from serve.limits import Limits
from tests.serve.browser import FAKE_CAMERA, Page, chromium
from tests.serve.conftest import Server, clip, serving
from tests.serve.models import save_small_model

pytestmark = pytest.mark.slow
CARD = {
    "name": "small",
    "sample": "shapes",
    "prompts": ["make it night", "add fog"],
    "words": ["make", "it", "night", "add", "fog", "blue"],
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium(*FAKE_CAMERA) as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    model = save_small_model(folder / "small", card=CARD)
    other = save_small_model(folder / "other", card={"name": "gold", "prompts": ["make it gold"]})
    both = (str(model), str(other))
    with serving(model, models=both, limits=Limits(max_pixels=320 * 240)) as running:
        engine: Any = running.engine
        engine.capacity.costs = {Sizes((32, 48), (32, 48)): 0.1}  # however busy the machine is
        engine.capacity.frame_s = 1e-7
        yield running


def test_one_click_edits_the_sample(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.loaded()
    assert page.chosen("from") == "sample"
    assert browser.execute_script("return document.querySelector('#preview video').paused") is False
    assert page["prompt"].get_attribute("value") == "make it night"
    page["play"].click()
    page.more(30)
    assert page.pixels("source")[..., :3].std() > 10, "the source is blank"
    assert page.pixels("edited")[..., :3].std() > 10, "the edit is blank"
    assert float(page["fps"].text) > 0
    assert float(page["delay"].text) > 0
    assert 0 < int(page["recomputed"].text) <= 100
    assert page.pixels("edited").shape[:2] == (128, 192)  # the clip's own size; the model's is less
    page.shot("sample")
    page.stop()
    assert page["start"].text == "Edit this clip"
    assert not page["error"].is_displayed()
    assert page.complaints() == []


def test_instructions_are_offered_remembered_and_checked(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    browser.execute_script("localStorage.clear()")
    page.start()
    assert page["chips"].text.split("\n") == ["make it night", "add fog"]
    page["prompt"].clear()
    page["prompt"].send_keys("Make it, sparkly blue")
    assert "sparkly" in page["unknown"].text
    assert "it" not in re.findall(r"\w+", page["unknown"].text.split(":")[1].split(".")[0])
    page["prompt"].clear()
    page["prompt"].send_keys("make it blue" + Keys.ENTER)
    page.until(lambda: page["state"].text == "live", "the instruction was not applied")
    assert page["unknown"].text == ""
    assert page["chips"].text.split("\n") == ["make it night", "add fog", "make it blue"]
    browser.find_elements("css selector", ".chip")[1].click()
    page.until(lambda: page["state"].text == "live", "the chip was not applied")
    assert page["prompt"].get_attribute("value") == "add fog"
    page.stop()


def test_a_model_is_chosen_by_name(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    browser.execute_script("localStorage.clear()")
    page.loaded()
    assert page["which"].text.split("\n") == ["small", "other"]
    assert page["prompt"].get_attribute("value") == "make it night"
    Select(page["which"]).select_by_visible_text("other")
    assert page["model"].text == "gold on cpu"
    assert page["prompt"].get_attribute("value") == "make it gold"
    made = server.front.services.metrics.frames.labels("everybody", "gold")
    assert made._value.get() == 0
    page.start()
    page.more(12)
    page.stop()
    assert made._value.get() > 12
    assert page.barriers() == []
    assert page.complaints() == []


def test_views_overlay_and_recording(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.start()
    page.more(12)
    for view, shown in (("corner", True), ("slider", True), ("side", True), ("edited", False)):
        page.choose("view", view)
        assert page["source"].is_displayed() is shown, view
        assert page["divider"].is_displayed() is (view == "slider")
    page.choose("view", "slider")
    page["divider"].send_keys(Keys.ARROW_RIGHT * 10)
    divider = "return document.getElementById('stage').style.getPropertyValue('--divider')"
    assert browser.execute_script(divider) == "60%"
    browser.execute_script("document.querySelector('details').open = true")
    page["mask"].click()
    page.until(lambda: page.pixels("tint")[..., 3].any(), "nothing is tinted")
    page.until(lambda: "% of the picture" in page["tinted"].text, "no share is told")
    recorded = browser.execute_script(
        "const seen = HTMLCanvasElement.prototype.captureStream;"
        "HTMLCanvasElement.prototype.captureStream = function (...a) {"
        "  window.recorded = this.id; return seen.apply(this, a); };"
        "document.getElementById('record').click(); return window.recorded"
    )
    assert recorded == "edited", "the overlay lies on another canvas, which is not recorded"
    page.more(20)
    page["record"].click()
    page.until(page["saved"].is_displayed, "no recording")
    page.stop()
    assert re.search(r"\([1-9][\d.]* [kM]B\)", page["download"].text)
    assert page.complaints() == []


def test_a_snapshot_is_the_edit_that_is_shown(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.loaded()
    assert not page["snapshot"].is_enabled()
    browser.execute_script("document.querySelector('details').open = true")
    page["mask"].click()
    page["start"].click()
    page.more(15)
    name, shown, saved = browser.execute_async_script(
        "const done = arguments[0], edited = document.getElementById('edited');"
        "HTMLAnchorElement.prototype.click = function () {"
        "  fetch(this.href).then((a) => a.blob()).then((b) => {"
        "    const r = new FileReader(); r.onload = () => done([this.download, shown, r.result]);"
        "    r.readAsDataURL(b); }); };"
        "const shown = edited.toDataURL();"
        "document.getElementById('snapshot').click();"
    )
    page.stop()
    assert name == "liveedit.png"
    assert saved == shown, "the tint lies on another canvas"


def test_full_screen_keeps_the_instruction_at_hand(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.start()
    full = "return document.fullscreenElement?.id ?? null"
    page["fullscreen"].click()
    page.until(lambda: browser.execute_script(full) == "theatre", "no full screen")
    screen = browser.execute_script("return [innerWidth, innerHeight]")
    for name in ("stage", "prompt", "apply", "start"):
        box = page[name].rect
        assert page[name].is_displayed()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= screen[0] + 1, name
        assert 0 <= box["y"] <= box["y"] + box["height"] <= screen[1] + 1, name
    look = "const s = getComputedStyle(arguments[0]); return [s.color, s.backgroundColor]"
    ink, paper = browser.execute_script(look, page["prompt"])
    assert ink != paper  # which axe-core does not see in full screen
    page.shot("full-screen")
    browser.execute_script("document.getElementById('fullscreen').click()")  # as Esc does
    page.until(lambda: browser.execute_script(full) is None, "still full screen")
    page.stop()
    assert page.complaints() == []


def test_a_camera_is_seen_before_it_is_sent(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.loaded()
    page.choose("from", "camera")
    page.until(lambda: page["start"].text == "Start", "no preview")
    page.loaded()
    playing = "return document.querySelector('#preview video').srcObject.active"
    assert browser.execute_script(playing)
    page["mirror"].click()
    assert "mirrored" in str(page["preview"].get_attribute("class"))
    page["start"].click()
    page.more(12)
    page.choose("from", "sample")  # the session goes on with another source
    page.until(lambda: page["state"].text == "live" and page.count < 12, "no new session")
    page.more(12)
    page.choose("from", "file")  # none is chosen: the sample goes on
    page.more(24)
    page.stop()
    assert page.complaints() == []


def test_flip_mirrors_what_is_sent(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.loaded()
    browser.execute_script("document.querySelector('#preview video').loop = false")
    page["mirror"].click()
    page["start"].click()
    page.more(9)
    browser.execute_script("document.querySelector('#preview video').pause()")
    page.more(24)
    drawn = browser.execute_script(
        "const v = document.querySelector('#preview video'), c = document.createElement('canvas');"
        "const s = document.getElementById('source'); c.width = s.width; c.height = s.height;"
        "c.getContext('2d').drawImage(v, 0, 0, c.width, c.height);"
        "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
    )
    source = page.pixels("source").astype(int)
    straight = np.array(drawn).reshape(source.shape)
    page.stop()
    assert np.abs(source - straight[:, ::-1]).mean() < 8 < np.abs(source - straight).mean()


def test_portrait_stays_portrait(browser: Chrome, server: Server, tmp_path: Path) -> None:
    video = tmp_path / "tall.mp4"
    with VideoWriter(video, 96, 160, 16) as writer:
        writer.write(clip(32, width=96, height=160))
    page = Page(browser, server.http)
    page.loaded()
    page.choose("from", "file")
    page["file"].send_keys(str(video))
    page.until(lambda: page["start"].text == "Edit it live", "the file is not previewed")
    page["start"].click()
    page.more(12)
    height, width, _ = page.pixels("edited").shape
    assert (width, height) == (96, 160)  # its own size, whatever the model's
    box = page["stage"].rect
    assert box["height"] > box["width"]
    page.stop()


def test_a_file_is_edited_once_and_saved(browser: Chrome, server: Server, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    with VideoWriter(video, 64, 48, 16) as writer:
        writer.write(clip(50, width=64, height=48))
    page = Page(browser, server.http)
    page.loaded()
    page.choose("from", "file")
    page["file"].send_keys(str(video))
    page.until(page["whole"].is_displayed, "the file is not offered")
    stop = browser.execute_script(
        "document.getElementById('whole').click();"
        "const { textContent, className } = document.getElementById('start');"
        "return [textContent, className]"
    )
    assert stop == ["Stop", ""], "it looks as if it started something"
    page.until(page["saved"].is_displayed, "no edited file")
    assert page["download"].get_attribute("download") == "clip-edited.mp4"
    data = browser.execute_async_script(
        "const done = arguments[0];"
        "fetch(document.getElementById('download').href).then((a) => a.blob()).then((b) => {"
        "  const r = new FileReader(); r.onload = () => done(r.result.split(',')[1]);"
        "  r.readAsDataURL(b); })"
    )
    saved = tmp_path / "saved.mp4"
    saved.write_bytes(base64.b64decode(data))
    info = probe(saved)
    assert (info.width, info.height) == (64, 48)
    assert sum(1 for _ in read_frames(saved)) == sum(1 for _ in read_frames(video))
    assert page["result"].is_displayed()
    assert page["start"].get_attribute("class") == "primary"
    assert page.complaints() == []


def test_progress_is_read_from_the_answer(browser: Chrome, server: Server, tmp_path: Path) -> None:
    video = tmp_path / "fragmented.mp4"
    with video.open("wb") as file:
        writer = VideoWriter(file, 64, 48, 16, fragmented=True)
        with writer:
            writer.write(clip(200, width=64, height=48))
    Page(browser, server.http)
    told = browser.execute_async_script(
        "const [data, size, done] = arguments;"
        "import('./mp4.js').then(({ Mp4Clock }) => {"
        "  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));"
        "  const clock = new Mp4Clock(), told = [];"
        "  for (let at = 0; at < bytes.length; at += size)"
        "    told.push(clock.push(bytes.subarray(at, at + size)));"
        "  done(told); })",
        base64.b64encode(video.read_bytes()).decode(),
        777,
    )
    assert told == sorted(told)
    assert 8 < told[-1] < 200 / 16  # where the last fragment of 12.5 s begins


def test_by_keyboard(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.loaded()
    page["prompt"].send_keys(Keys.ENTER)
    page.more(9)
    page["prompt"].send_keys(Keys.TAB * 2)
    assert browser.switch_to.active_element == page["start"]
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    page.ready()


def test_the_page_reconnects_by_itself(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.start()
    page.more(15)
    # The page says it for half a second, less than a look from outside may take.
    browser.execute_script(
        "window.said = [];"
        "new MutationObserver(() => said.push(document.getElementById('state').textContent))"
        ".observe(document.getElementById('state'), {childList: true});"
    )
    server.call(lambda: [connection.leave() for connection in server.front.connections])
    said = "return said.join('; ')"
    page.until(
        lambda: browser.execute_script(said) == "connection lost, reconnecting; live",
        "neither noticed nor mended",
    )
    page.more(15)
    page.stop()
    assert not page["error"].is_displayed()


def test_a_slow_machine_is_told_and_offered_what_fits(browser: Chrome, server: Server) -> None:
    Page(browser, server.http).loaded()
    advise = (
        "const [about, done] = arguments;"
        "import('./advice.js').then(({ advise }) => done(advise(about)))"
    )
    about = {"seconds": 3.0, "frames": 12, "fps": 16, "width": 224, "height": 128}
    told = browser.execute_async_script(advise, about)
    assert "3.0 s for 0.75 s" in told["text"]
    assert told["fps"] == 3  # 0.85 * 12 / 3.0
    assert told["work"] == "96x64"  # 0.46 of each side, in sixteens, above 64
    assert browser.execute_async_script(advise, {**about, "seconds": 0.75}) is None
    least = {**about, "width": 64, "height": 64}
    assert browser.execute_async_script(advise, least)["work"] is None


MODEL = {
    "width": 224, "height": 128, "chunk_frames": 12, "work_size": "native", "max_side": 1920,
    "max_pixels": 1280 * 720, "max_work_pixels": 1280 * 720, "chunk_seconds": 0.3,
    "frame_seconds": 1e-7,
}  # fmt: skip
USUAL = "224x128, the server's choice"


@pytest.mark.parametrize(
    ("source", "model", "sent", "offered"),
    [
        # 0.6375 s are there at 16 fps; of 0.3 s the networks take 0.297.
        ((448, 256), {}, (448, 256), [USUAL, "320x176, finer"]),
        ((1280, 720), {}, (1280, 720), [USUAL]),
        ((1920, 1080), {}, (1280, 720), [USUAL]),
        (
            (720, 1280),
            {"max_side": 640},
            (360, 640),
            ["128x224, the server's choice", "176x320, finer"],
        ),
        ((224, 128), {}, (224, 128), [USUAL]),
        ((448, 256), {"max_work_pixels": 50_000}, (448, 256), [USUAL]),
        # A pixel costs ten times as much: 0.366 s are left for them.
        ((1280, 720), {"frame_seconds": 1e-6}, (806, 452), [USUAL]),
        ((448, 256), {"chunk_seconds": 0.7}, (224, 128), [USUAL, "160x96, faster"]),
        ((448, 256), {"work_size": "1/2"}, (448, 256), [USUAL, "320x176, finer"]),
        ((448, 256), {"work_size": "full"}, (224, 128), [USUAL]),
    ],
)
def test_the_source_s_size_is_sent_and_work_sizes_are_offered_where_they_help(
    browser: Chrome,
    server: Server,
    source: tuple[int, int],
    model: dict[str, Any],
    sent: tuple[int, int],
    offered: list[str],
) -> None:
    if browser.current_url == "data:,":
        Page(browser, server.http)
    found, texts = browser.execute_async_script(
        "const [width, height, model, done] = arguments;"
        "import('./sizes.js').then(({ sent, offers }) => {"
        "  const frame = sent({ width, height }, model, 16);"
        "  done([[frame.width, frame.height], offers(frame, model, 16).map((o) => o.text)]); })",
        *source,
        MODEL | model,
    )
    assert (tuple(found), texts) == (sent, offered)


def test_sizes_that_the_model_was_not_trained_at_are_named(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.loaded()
    unlike = (
        "const [size, model, done] = arguments;"
        "import('./sizes.js').then(({ unlikeTraining, parsed }) =>"
        "  done(unlikeTraining(parsed(size), model)))"
    )
    own = {"width": 224, "height": 128}
    for trained in ([], ["224x128"], ["64x32", "160x96"]):
        model = own | {"card": {"trained_at": trained}}
        for work in ("224x128", "160x96", "144x96", "320x176", "320x192", "64x64", "96x64"):
            said = browser.execute_async_script(unlike, work, model).removesuffix(".")
            taught = [in_pixels(size) for size in trained] or [(128, 224)]
            assert said == unlike_training(in_pixels(work), taught).replace("it", "It", 1), work
    assert page["unlike"].text == ""
    choose = (
        "const work = document.getElementById('work');"
        "work.add(new Option(arguments[0], arguments[0])); work.value = arguments[0];"
        "work.dispatchEvent(new Event('change'))"
    )
    browser.execute_script(choose, "192x128")
    assert "It edits at 192x128, far from the 48x32 that this model" in page["unlike"].text
    page["start"].click()
    page.more(9)
    assert "192x128" in page["unlike"].text
    browser.execute_script(choose, "64x32")
    page.until(lambda: page["unlike"].text == "", "said of a size that is near")
    page.until(lambda: page["state"].text == "live", "no session at that size")
    page.stop()


@pytest.mark.parametrize("width", [360, 390, 1366, 1920])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hinders_anybody(browser: Chrome, server: Server, width: int, scheme: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    look = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", look)
    try:
        page = Page(browser, server.http)
        page.loaded()
        assert page.barriers() == []
        page.shot(f"{width}-{scheme}-before")
        page["play"].click()
        page.more(9)
        wide = "return document.documentElement.scrollWidth"
        for view in ("corner", "slider", "side", "edited"):
            page.choose("view", view)
            assert browser.execute_script(wide) <= width, view
        assert page.barriers() == []
        page.shot(f"{width}-{scheme}-during")
        for name in ("start", "prompt"):
            box = page[name].rect
            assert box["y"] + box["height"] <= 800, f"{name} is below the first screen"
            assert box["height"] >= 40, f"{name} is too small for a finger"
        page.stop()
        assert page.barriers() == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_full_server_queues_and_is_tried_again(browser: Chrome, tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "small", card=CARD)
    with serving(model, limits=Limits(max_sessions=1)) as full:
        first = Page(browser, full.http)
        first.start()
        original = browser.current_window_handle
        browser.switch_to.new_window("tab")
        try:
            page = Page(browser, full.http)
            page.loaded()
            page["start"].click()
            assert page.complaint() == "All places are taken at the moment."
            assert "by itself in" in page["retry"].text
            browser.switch_to.window(original)
            first.stop()
            browser.switch_to.window(browser.window_handles[-1])
            page.until(lambda: page["state"].text == "live", "not tried again")
            assert not page["error"].is_displayed()
            page.stop()
        finally:
            browser.close()
            browser.switch_to.window(original)
