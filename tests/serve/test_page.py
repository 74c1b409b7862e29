"""The page in a headless Chromium with a fake camera."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from data.video import VideoWriter
from tests.serve.conftest import Server, clip, serving

INSTALL = "apt-get install -y chromium chromium-driver"
SHOTS = os.environ.get("LIVEEDIT_SCREENSHOTS")  # a folder: keep pictures of what was tested


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = f"the page is tested in Chromium, which is not installed: {INSTALL}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = Chrome(options=options, service=ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()


class Page:
    def __init__(self, browser: Chrome, server: Server, query: str = "") -> None:
        self.browser = browser
        browser.get(f"{server.http}/{query}")

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        wait = WebDriverWait(self.browser, 60)
        return wait.until(lambda _: condition(), f"{what}; state {self['state'].text}")

    def start(self) -> None:
        self.until(lambda: " on " in self["model"].text, "no model")
        self["start"].click()
        self.until(lambda: self["state"].text == "live", "never live")

    def stop(self) -> None:
        self["start"].click()
        self.until(lambda: self["state"].text == "not connected", "did not stop")

    @property
    def count(self) -> int:
        return int(self["count"].text)

    def more(self, frames: int) -> None:
        wanted = self.count + frames
        self.until(lambda: self.count >= wanted, f"fewer than {wanted} edited frames")

    def pixels(self, canvas: str) -> np.ndarray:
        """uint8 [height, width, 4]"""
        data, width, height = self.browser.execute_script(
            "const c = document.getElementById(arguments[0]);"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "return [Array.from(d), c.width, c.height]",
            canvas,
        )
        return np.array(data, np.uint8).reshape(height, width, 4)

    def choose(self, name: str, value: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, f"input[name={name}][value={value}]").click()

    def shot(self, name: str) -> None:
        if SHOTS:
            self.browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))

    def complaints(self) -> list[str]:
        return [e["message"] for e in self.browser.get_log("browser") if e["level"] == "SEVERE"]


def test_a_webcam_is_edited_live(browser: Chrome, server: Server) -> None:
    page = Page(browser, server)
    page.start()
    page.more(30)
    assert page.pixels("source")[..., :3].std() > 10, "the source is blank"
    assert page.pixels("edited")[..., :3].std() > 10, "the edit is blank"
    assert page["fps"].text != "-"
    assert page["delay"].text.endswith("s")
    assert page["recomputed"].text.endswith("%")
    page.shot("side")

    page["prompt"].clear()
    page["prompt"].send_keys("make it blue" + Keys.ENTER)
    page.until(lambda: page["state"].text == "live", "the instruction was not applied")

    page.choose("view", "slider")
    assert page["divider"].is_displayed()
    page["divider"].send_keys(Keys.ARROW_RIGHT * 10)
    assert page["stage"].get_attribute("style") == "--divider: 60%;"
    page["mask"].click()
    page.more(15)
    page.shot("slider")

    page.choose("view", "edited")
    assert not page["source"].is_displayed()
    page["record"].click()
    page.more(20)
    page["record"].click()
    page.until(page["download"].is_displayed, "no recording")
    page.stop()
    assert re.search(r"\([1-9][\d.]* [kM]B\)", page["download"].text)
    assert not page["error"].is_displayed()
    assert page.complaints() == []


def test_a_file_by_keyboard(browser: Chrome, server: Server, tmp_path: Path) -> None:
    video = tmp_path / "clip.webm.mp4"
    with VideoWriter(video, 64, 64, 16) as writer:
        writer.write(clip(32, width=64, height=64))
    page = Page(browser, server)
    page.until(lambda: " on " in page["model"].text, "no model")
    first = browser.find_element(By.CSS_SELECTOR, "input[name=from]:checked")
    first.send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page["file"].is_displayed()
    page["file"].send_keys(str(video))
    page["prompt"].send_keys(Keys.ENTER)
    page.until(lambda: page["state"].text == "live", "never live")
    page.more(12)
    page["prompt"].send_keys(Keys.TAB * 2)
    assert browser.switch_to.active_element == page["start"]
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    page.until(lambda: page["state"].text == "not connected", "did not stop")
    assert page.complaints() == []


def test_the_page_reconnects_by_itself(browser: Chrome, server: Server) -> None:
    page = Page(browser, server)
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


def test_a_phone_shows_everything_without_scrolling_sideways(
    browser: Chrome, server: Server
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        page = Page(browser, server)
        page.start()
        page.more(12)
        for view in ("side", "slider", "edited"):
            page.choose("view", view)
            wide = "return document.documentElement.scrollWidth"
            assert browser.execute_script(wide) <= 360, view
        page.shot("phone")
        form, numbers = page["controls"].rect, page["numbers"].rect
        assert page["start"].rect["y"] < 740, "Start is below the first screen"
        assert form["y"] + form["height"] <= numbers["y"]
        for button in browser.find_elements(By.TAG_NAME, "button"):
            assert button.rect["height"] >= 40, "too small for a finger"
        page.stop()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_errors_are_said_for_people(
    browser: Chrome, server: Server, small_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text("secret\n")
    with serving(small_model, token_file=str(tmp_path / "tokens")) as guarded:
        page = Page(browser, guarded)
        page.until(lambda: page["model"].text == "needs a token", "no word of the token")
        page["start"].click()
        page.until(page["error"].is_displayed, "no error")
        assert "asks for a token" in page["error"].text
        page.shot("error")
        page = Page(browser, guarded, "?token=secret")
        page.start()
        page.more(9)
        page.stop()
    page = Page(browser, server)
    page.until(lambda: " on " in page["model"].text, "no model")
    page.choose("from", "file")
    page["start"].click()
    page.until(page["error"].is_displayed, "no error")
    assert page["error"].text == "Choose a video file first."
    browser.execute_script("document.getElementById('width').value = 9000")
    page["start"].click()
    assert page["width"].is_displayed(), "the field that is wrong stays hidden"
    assert browser.switch_to.active_element == page["width"]
    assert page["state"].text == "not connected"
