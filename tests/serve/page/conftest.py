"""One Chromium with a fake camera, and a server of two models, for every file here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from selenium.webdriver import Chrome

from serve.admission.admission import Sizes
from serve.limits import Limits
from tests.serve.conftest import Server, serving
from tests.serve.models import save_small_model
from tests.serve.page.browser import CARD, FAKE_CAMERA, chromium


@pytest.fixture(scope="package")
def browser() -> Iterator[Chrome]:
    with chromium(*FAKE_CAMERA) as started:
        yield started


@pytest.fixture(scope="package")
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
