"""The page in a headless Chromium with a fake camera: live sessions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.support.ui import Select

from serve.limits import Limits
from tests.serve.conftest import Server, serving
from tests.serve.models import save_small_model
from tests.serve.page.browser import CARD, Page

pytestmark = pytest.mark.slow


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
    assert page["play"].text == "Edit this clip"
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


def test_a_camera_is_seen_before_it_is_sent(browser: Chrome, server: Server) -> None:
    page = Page(browser, server.http)
    page.loaded()
    page.choose("from", "camera")
    page.until(lambda: page["play"].text == "Start", "no preview")
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
