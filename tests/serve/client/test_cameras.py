from __future__ import annotations

import json

from serve.client.cameras import Load, measure, percentile
from tests.serve.conftest import Server


def test_cameras_are_measured(server: Server) -> None:
    load = Load(width=48, height=32, mode="lossless", seconds=4.0, fps=20.0)
    report = measure(server.url, load, 2).to_dict()
    assert report["sessions_held"] == 2
    assert report["frames_sent"] == report["frames_edited"] == 160
    assert report["frames_lost"] == report["frames_repeated"] == report["frames_dropped"] == 0
    # 80 frames are 9 and 5 times 12 and a rest; the first two chunks and the rest do not count.
    assert report["chunks"] == 2 * 4
    assert report["overhead_ms_p50"] < report["chunk_latency_ms_p50"]  # type: ignore[operator]
    assert report["first_chunk_ms_p50"] > 0  # type: ignore[operator]
    assert report["errors"] is None
    json.dumps(report)


def test_a_live_camera_and_a_kill_that_finds_nothing(server: Server) -> None:
    asked = 0

    async def kill() -> bool:
        nonlocal asked
        asked += 1
        return False

    load = Load(width=48, height=32, mode="live", seconds=3.0)
    report = measure(server.url, load, 1, kill=kill, kill_every_s=1.0).to_dict()
    assert report["frames_edited"] + report["frames_dropped"] == 48  # type: ignore[operator]
    assert report["kills"] == 0
    assert asked >= 2


def test_a_server_that_is_not_there_is_an_error_in_the_report() -> None:
    report = measure("ws://127.0.0.1:9", Load(seconds=1.0), 1).to_dict()
    assert report["sessions_held"] == 0
    assert "cannot be reached" in str(report["errors"])


def test_percentile() -> None:
    assert percentile([], 50) is None
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
