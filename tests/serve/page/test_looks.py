"""The page at the sizes of screens, light and dark: nothing hidden, nothing in anybody's way."""

from __future__ import annotations

from typing import Any

import pytest
from selenium.webdriver import Chrome

from serve.admission.admission import Sizes
from tests.serve.conftest import Server
from tests.serve.page.browser import Page

pytestmark = pytest.mark.slow


def test_full_screen_keeps_the_instruction_at_hand(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.start()
    full = "return document.fullscreenElement?.id ?? null"
    page["fullscreen"].click()
    page.until(lambda: browser.execute_script(full) == "theatre", "no full screen")
    for size in (None, (844, 390)):  # as it is, and a phone on its side
        if size:
            emulated = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride", emulated | {"mobile": True}
            )
        screen = browser.execute_script("return [innerWidth, innerHeight]")
        assert size in (None, tuple(screen))
        for name in ("stage", "prompt", "apply", "start", "chips"):
            box = page[name].rect
            assert page[name].is_displayed()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= screen[0] + 1, name
            assert 0 <= box["y"] <= box["y"] + box["height"] <= screen[1] + 1, name
        stage = page["stage"].rect
        assert stage["y"] + stage["height"] <= page["prompt"].rect["y"], "it lies over the prompt"
        page.shot(f"full-screen-{screen[0]}")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    look = "const s = getComputedStyle(arguments[0]); return [s.color, s.backgroundColor]"
    ink, paper = browser.execute_script(look, page["prompt"])
    assert ink != paper  # which axe-core does not see in full screen
    browser.execute_script("document.getElementById('fullscreen').click()")  # as Esc does
    page.until(lambda: browser.execute_script(full) is None, "still full screen")
    page.stop()
    assert page.complaints() == []


# What a browser's own bars leave of a screen; the third is a phone on its side.
SCREENS = [(360, 640), (390, 700), (844, 360), (1366, 650), (1920, 950)]


@pytest.mark.parametrize(("width", "height"), SCREENS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hinders_anybody(
    browser: Chrome,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    height: int,
    scheme: str,
) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 900}
    look = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", look)
    try:
        engine: Any = server.engine
        with monkeypatch.context() as slow:
            slow.setattr(engine.capacity, "costs", {Sizes((32, 48), (32, 48)): 2.0})
            page = Page(browser, server.http)
            page.loaded()
        assert page["advice"].is_displayed()
        assert page.barriers() == []
        page.shot(f"{width}-{scheme}-slow")
        for name in ("start", "prompt", *(["numbers"] if height > 400 else [])):
            box = page[name].rect
            assert box["y"] + box["height"] <= height, f"{name} is below the first screen"
            assert box["height"] >= 40 or name == "numbers", f"{name} is too small for a finger"
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
        page.stop()
        assert page.barriers() == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
