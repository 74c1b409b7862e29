"""Places are waited for between runs: a session's, while it lasts and when its client is gone."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from infra.runtime.errors import UserError
from pipelines.bench import room
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


@pytest.mark.parametrize(
    ("url", "metrics"),
    [
        ("ws://h:1", "http://h:1/metrics"),
        ("https://h", "https://h/metrics"),
        ("wss://h/v1/stream", "https://h/metrics"),
        ("https://h:1/behind/a/proxy", "https://h:1/behind/a/proxy/metrics"),
    ],
)
def test_metrics_lie_beside_the_streams(url: str, metrics: str) -> None:
    assert room._metrics(url) == metrics


def test_a_server_is_asked_now_and_then_until_it_holds_no_more_or_for_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that does not answer for a while is asked again; what was found last is said."""
    now, asked = [100.0], list[float]()

    def found(url: str) -> int:
        asked.append(now[0])
        answer = answers[min(len(asked), len(answers)) - 1]
        if answer is None:
            raise ConnectionRefusedError("no")
        return answer

    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(room.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(room, "held", found)
    answers: list[int | None] = [None, 5, 4, 3]
    until_left("ws://h:1", 3)
    assert asked == [100.0 + n * room.ASKS_S for n in range(4)]
    asked.clear()
    answers = [None, 5]
    with pytest.raises(UserError, match=r"within 2 s: 5 sessions and streams are there and 4 were"):
        until_left("ws://h:1", 4, patience_s=2.0)
    assert asked[-1] - asked[0] == 2.0 - room.ASKS_S
