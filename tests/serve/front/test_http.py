"""The HTTP routes: health, models, metrics, tokens, whole videos."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from data.video import VideoWriter, probe, read_frames
from serve.client import edit_frames
from serve.limits import Limits
from tests.serve.conftest import Server, clip, serving


def test_health_ready_models(server: Server) -> None:
    assert httpx.get(f"{server.http}/healthz").json()["status"] == "ok"
    assert httpx.get(f"{server.http}/readyz").json() == {"status": "ready"}
    (model,) = httpx.get(f"{server.http}/v1/models").json()["models"]
    assert model["name"] == "small"
    assert (model["width"], model["height"]) == (48, 32)
    assert (model["chunk_frames"], model["first_chunk_frames"]) == (12, 9)
    assert model["chunk_seconds"] > 0


def test_metrics_count_what_happened(small_model: Path) -> None:
    with serving(small_model) as server:
        list(edit_frames(server.url, clip(30), "make it red", fps=16))
        text = httpx.get(f"{server.http}/metrics").text
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    front = ("process", "front")
    assert values["liveedit_sessions", front] == 0
    assert values["liveedit_sessions_admitted_total", front] == 1
    assert values["liveedit_sessions_ended_total", front, ("reason", "close")] == 1
    assert values["liveedit_frames_edited_total", front] == 30
    assert values["liveedit_chunk_latency_seconds_count", front] == 3
    assert values["liveedit_first_chunk_seconds_count", front] == 1
    assert values["liveedit_recomputed_share_count", front] == 3
    assert values["liveedit_gpu_seconds_total", front] > 0
    assert values["liveedit_editor_busy_seconds", ("process", "editor")] > 0


def test_tokens_guard_the_api_not_the_page(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("secret\n")
    with serving(small_model, token_file=str(tmp_path / "tokens")) as server:
        assert httpx.get(f"{server.http}/v1/models").status_code == 401
        assert httpx.post(f"{server.http}/v1/edits").status_code == 401
        header = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{server.http}/v1/models", headers=header).status_code == 200
        assert httpx.get(f"{server.http}/v1/models?token=secret").status_code == 200
        for path in ("/", "/healthz", "/readyz", "/metrics"):
            assert httpx.get(server.http + path).status_code == 200


def video(frames: np.ndarray, fps: int = 16) -> bytes:
    buffer = io.BytesIO()
    with VideoWriter(buffer, frames.shape[2], frames.shape[1], fps) as writer:
        writer.write(frames)
    return buffer.getvalue()


def post(server: Server, data: bytes, **fields: str) -> httpx.Response:
    return httpx.post(
        f"{server.http}/v1/edits", files={"video": ("clip.mp4", data)}, data=fields, timeout=60
    )


def test_a_video_comes_back_whole(server: Server, tmp_path: Path) -> None:
    response = post(server, video(clip(40), fps=24), prompt="make it red", seed="3")
    assert response.status_code == 200
    assert response.headers["content-type"] == "video/mp4"
    path = tmp_path / "edited.mp4"
    path.write_bytes(response.content)
    info = probe(path)
    assert (info.width, info.height, info.fps) == (48, 32, 24)
    assert len(list(read_frames(path))) == 40
    again = post(server, video(clip(40), fps=24), prompt="make it red", seed="3")
    assert again.content == response.content


def test_it_streams_while_it_edits(server: Server) -> None:
    files = {"video": ("clip.mp4", video(clip(100)))}
    pieces = []
    with httpx.stream(
        "POST", f"{server.http}/v1/edits", files=files, data={"prompt": "x"}, timeout=60
    ) as response:
        for piece in response.iter_raw():
            pieces.append(len(piece))
            if len(pieces) == 1:
                # The first piece is here while the editor still has the rest before it.
                backend = server.front.services.backend
                assert backend.capacity.loads
    assert len(pieces) > 3


@pytest.mark.parametrize(
    ("data", "fields", "status", "named"),
    [
        (b"not a video", {"prompt": "x"}, 400, "not a readable video"),
        (None, {}, 400, "prompt"),
        (None, {"prompt": " "}, 400, "prompt"),
        (None, {"prompt": "x", "seed": "-1"}, 400, "seed"),
        (None, {"prompt": "x", "sed": "1"}, 400, "sed"),
    ],
)
def test_wrong_uploads(
    server: Server, data: bytes | None, fields: dict[str, str], status: int, named: str
) -> None:
    response = post(server, video(clip(9)) if data is None else data, **fields)
    assert response.status_code == status
    assert named in response.json()["error"]["message"]


def test_uploads_are_limited_and_paths_stay_inside(small_model: Path) -> None:
    with serving(small_model, Limits(max_upload=10_000, max_pixels=1000)) as server:
        response = post(server, bytes(20_000), prompt="x")
        assert response.status_code == 400
        assert "larger than 10000 bytes" in response.json()["error"]["message"]
        response = post(server, video(clip(2)), prompt="x")
        assert response.json()["error"]["code"] == "unsupported_size"
