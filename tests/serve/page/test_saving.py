"""What can be saved from the page: a recording, a snapshot, a file that was edited whole."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome, Keys

from data.video import VideoWriter, probe, read_frames
from tests.serve.conftest import Server, clip
from tests.serve.page.browser import Page

pytestmark = pytest.mark.slow


def test_views_overlay_and_recording(browser: Chrome, server: Server, tmp_path: Path) -> None:
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
    browser.execute_script(
        "const draw = CanvasRenderingContext2D.prototype.drawImage; window.shown = [];"
        "CanvasRenderingContext2D.prototype.drawImage = function (...a) {"
        "  draw.apply(this, a);"
        "  if (this.canvas.id === 'edited') shown.push(this.canvas.toDataURL()); };"
    )
    page["record"].click()
    page.more(20)
    page["record"].click()
    page.until(page["saved"].is_displayed, "no recording")
    page.stop()
    assert re.search(r"\([1-9][\d.]* [kM]B\)", page["download"].text)
    recording = tmp_path / page["download"].get_attribute("download")
    recording.write_bytes(page.downloaded())
    shown = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))
            for url in browser.execute_script("return shown")
        ]
    )
    recorded = np.stack(list(read_frames(recording)))
    assert len(recorded) >= 10
    # By squares as the tint has them: the browser's codec loses what is finer.
    shown, recorded = squares(shown), squares(recorded)
    tinted = 0.65 * shown + 0.35 * np.array([255.0, 196, 0])
    from_edit, from_tint = (
        np.abs(recorded[:, None] - one).mean((-3, -2, -1)).min(1) for one in (shown, tinted)
    )
    assert from_edit.max() < 3 < 30 < from_tint.min()
    assert page.complaints() == []


def squares(frames: np.ndarray) -> np.ndarray:
    """[frames, height, width, 3] -> the mean of every 16x16 pixels, float."""
    frames = frames.astype(float)
    n, height, width, _ = frames.shape
    return frames.reshape(n, height // 16, 16, width // 16, 16, 3).mean((2, 4))


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
    saved = tmp_path / "saved.mp4"
    saved.write_bytes(page.downloaded())
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
