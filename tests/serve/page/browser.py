"""A headless Chromium, and the page in it."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_core_python.selenium import Axe
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

INSTALL = "apt-get install -y chromium chromium-driver"
SHOTS = os.environ.get("LIVEEDIT_SCREENSHOTS")  # a folder: keep pictures of what was tested
FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
CARD = {
    "name": "small",
    "sample": "shapes",
    "prompts": ["make it night", "add fog"],
    "words": ["make", "it", "night", "add", "fog", "blue"],
}


@contextmanager
def chromium(*arguments: str) -> Iterator[Chrome]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        reason = f"the page is tested in Chromium, which is not installed: {INSTALL}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = ChromeOptions()
    options.binary_location = binary
    plain = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900")
    for argument in (*plain, *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = Chrome(options=options, service=ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()


class Page:
    """`page[ID]` is an element; every wait ends with the page's own words."""

    def __init__(self, browser: Chrome, url: str, query: str = "") -> None:
        self.browser = browser
        browser.get_log("browser")  # what was said of the page before
        browser.get(f"{url}/{query}")

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        wait = WebDriverWait(self.browser, 60)
        said = f"; state {self['state'].text!r}, error {self['error'].text!r}"
        return wait.until(lambda _: condition(), what + said)

    def loaded(self) -> None:
        self.until(lambda: self["note"].text.startswith("first edit"), "no model, or no sample")

    def start(self) -> None:
        self.loaded()
        self["start"].click()
        self.until(lambda: self["state"].text == "live", "never live")

    def stop(self) -> None:
        self["start"].click()
        self.ready()

    def ready(self) -> None:
        self.until(lambda: self["state"].text == "ready", "did not stop")

    def complaint(self) -> str:
        """What the page says is wrong, as soon as it does."""
        self.until(self["error"].is_displayed, "no error")
        return self["error-text"].text

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
        chosen = f"input[name={name}][value={value}]"
        self.browser.execute_script("document.querySelector(arguments[0]).click()", chosen)

    def chosen(self, name: str) -> str:
        checked = f"input[name={name}]:checked"
        return str(self.browser.find_element(By.CSS_SELECTOR, checked).get_attribute("value"))

    def downloaded(self) -> bytes:
        """What the link to what was saved leads to."""
        data = self.browser.execute_async_script(
            "const done = arguments[0];"
            "fetch(document.getElementById('download').href).then((a) => a.blob()).then((b) => {"
            "  const r = new FileReader(); r.onload = () => done(r.result.split(',')[1]);"
            "  r.readAsDataURL(b); })"
        )
        return base64.b64decode(data)

    def barriers(self) -> list[str]:
        """What axe-core has against the page as it is."""
        found = Axe().run(self.browser)["violations"]
        return [f"{v['id']}: {[node['html'] for node in v['nodes']]}" for v in found]

    def shot(self, name: str) -> None:
        if SHOTS:
            self.browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))

    def complaints(self) -> list[str]:
        return [e["message"] for e in self.browser.get_log("browser") if e["level"] == "SEVERE"]
