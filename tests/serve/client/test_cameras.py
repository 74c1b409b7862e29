from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.client.attacks import ATTACKS, bomb
from serve.client.cameras import CameraLoad, measure, percentile
from serve.client.floods import FLOODS
from serve.limits import Limits
from serve.wire import codec
from serve.wire.protocol import WireError
from tests.serve.conftest import Server, serving


def test_cameras_are_measured(server: Server) -> None:
    load = CameraLoad(width=48, height=32, mode="lossless", seconds=1.6, fps=50.0)
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

    load = CameraLoad(width=48, height=32, mode="live", seconds=1.0, fps=48.0)
    report = measure(server.url, load, 1, kill=kill, kill_every_s=0.3).to_dict()
    assert report["frames_edited"] + report["frames_dropped"] == 48  # type: ignore[operator]
    assert report["kills"] == 0
    assert asked >= 2


@pytest.mark.slow  # starts a process for each attack
@pytest.mark.parametrize(
    "names",
    [
        ("slow-upload",),
        ("scan-bomb", "large-scan-bomb", "false-fps"),
        ("prompt-flood", "prompt-switch", "open-close", "leave-queue", "wrong-resume"),
    ],
)
def test_an_honest_camera_beside_attacks(small_model: Path, names: tuple[str, ...]) -> None:
    with serving(small_model, Limits(max_uploads=4), max_sessions=64) as attacked:
        load = CameraLoad(width=48, height=32, mode="lossless", seconds=4.0, fps=16.0)
        report = measure(attacked.url, load, 1, attacks=names).to_dict()
        refused = attacked.front.services.metrics.refused
        told = {sample.labels["code"] for m in refused.collect() for sample in m.samples}
        admitted = attacked.front.services.metrics.admitted.collect()[0].samples
    assert report["attacks"] == ", ".join(names)
    assert (report["frames_edited"], report["frames_lost"], report["errors"]) == (64, 0, None)
    # It did attack: uploads are turned away, and the others have been sessions beside the camera.
    assert ("at_capacity" in told) is ("slow-upload" in names)
    assert ("bad_request" in told) is ("wrong-resume" in names)
    assert (sum(s.value for s in admitted) > 1) is ("slow-upload" not in names)


def test_every_attack_is_tried_by_a_test() -> None:
    """Those of `FLOODS` in `test_floods`, the others above."""
    marks = test_an_honest_camera_beside_attacks.pytestmark  # type: ignore[attr-defined]
    tried = next(mark.args[1] for mark in marks if mark.name == "parametrize")
    assert {name for names in tried for name in names} | set(FLOODS) == set(ATTACKS)


def test_a_bomb_is_one() -> None:
    image = bomb(1280, 720)
    assert 50_000 < len(image) <= 62_000
    assert (image.count(b"\xff\xd9"), image[-2:]) == (1, b"\xff\xd9")  # no scan is behind its end
    with pytest.raises(WireError, match="scans; at most 20"):
        codec.decode(image, "jpeg", width=1280, height=720)


def test_a_server_that_is_not_there_is_an_error_in_the_report() -> None:
    report = measure("ws://127.0.0.1:9", CameraLoad(seconds=1.0), 1).to_dict()
    assert report["sessions_held"] == 0
    assert "cannot be reached" in str(report["errors"])


def test_percentile() -> None:
    assert percentile([], 50) is None
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
