"""Which sizes and rates the page sends, offers and warns of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from data.video import VideoWriter
from modeling.detail.work_size import in_pixels, unlike_training
from serve.admission.admission import Sizes
from tests.serve.conftest import Server, clip
from tests.serve.page.browser import Page

pytestmark = pytest.mark.slow


def test_portrait_stays_portrait(
    browser: Chrome, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine: Any = server.engine  # which has learnt from the sessions before, on a busy machine
    monkeypatch.setattr(engine.capacity, "costs", {Sizes((32, 48), (32, 48)): 0.1})
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
