"""Places are waited for between runs: a session's, while it lasts and when its client is gone."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from infra.runtime.errors import UserError
from pipelines.bench.room import held, until_left
from serve.client import connect
from tests.serve.conftest import serving
from tests.serve.models import save_small_model


def test_a_place_is_waited_for_until_it_is_given_back(tmp_path: Path) -> None:
    opened, leave = threading.Event(), threading.Event()

    async def stay(url: str) -> None:
        async with connect(url, "x", width=48, height=32, fps=8.0):
            opened.set()
            await asyncio.to_thread(leave.wait)

    with serving(save_small_model(tmp_path / "small")) as server:
        assert held(server.url) == 0
        staying = threading.Thread(target=lambda: asyncio.run(stay(server.url)))
        staying.start()
        assert opened.wait(60)
        there = held(server.url)
        until_left(server.url, there)  # nobody came since: no wait
        with pytest.raises(
            UserError, match=rf"within 0.1 s: {there} .* 0 were before; see {server.http}/metrics"
        ):
            until_left(server.url, 0, patience_s=0.1)
        leave.set()
        until_left(server.url, 0)
        assert held(server.url) == 0
        staying.join()
    assert there == 2, "it is connected, and an editor edits it"


def test_a_server_that_is_gone_is_said() -> None:
    with pytest.raises(UserError, match=r"it does not answer .*; see http://127.0.0.1:9/metrics"):
        until_left("ws://127.0.0.1:9", 0, patience_s=0.1)
