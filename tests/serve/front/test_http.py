"""The HTTP routes: health, models, metrics, tokens, whole videos."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from data.video import VideoInfo, VideoWriter, probe, read_frames, read_timed
from serve.client import edit_frames
from serve.limits import Limits
from serve.wire.protocol import WireError
from tests.serve.conftest import Server, clip, serving
from tests.serve.tokens import write_tokens


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
    who = (("model", "small"), front, ("tenant", "everybody"))
    assert values["liveedit_sessions_admitted_total", *who] == 1
    ended = (("model", "small"), front, ("reason", "close"), ("tenant", "everybody"))
    assert values["liveedit_sessions_ended_total", *ended] == 1
    assert values["liveedit_frames_edited_total", *who] == 30
    assert values["liveedit_chunk_latency_seconds_count", front] == 3
    assert values["liveedit_first_chunk_seconds_count", front] == 1
    assert values["liveedit_recomputed_share_count", front] == 3
    assert values["liveedit_gpu_seconds_total", *who] > 0
    assert values["liveedit_editor_busy_seconds_total", ("process", "editor")] > 0


def test_tokens_guard_the_api_not_the_page(small_model: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens")
    with serving(small_model, token_file=str(tokens)) as server:
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
    assert "x-liveedit-unknown-words" not in again.headers
    strange = post(server, video(clip(9)), prompt="make it snow, très red")
    assert strange.headers["x-liveedit-unknown-words"] == "snow, tr?s"


def stamped(path: Path, times: list[int], *, pixel_format: str = "yuv420p") -> bytes:
    """A video whose frames are shown at `times`, in seconds."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=16, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, pixel_format
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(clip(len(times)), times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format=pixel_format)
            frame.pts, frame.time_base = 1000 * time, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path.read_bytes()


def test_stamps_that_are_days_apart_ask_for_no_more_frames(server: Server, tmp_path: Path) -> None:
    data = stamped(tmp_path / "in.mkv", [30 * 24 * 3600 * n for n in range(10)])
    assert len(data) < 10_000
    response = post(server, data, prompt="make it red")
    assert response.status_code == 200
    assert "time stamps jump ahead 9 times" in response.headers["x-liveedit-differs"]
    (tmp_path / "out.mp4").write_bytes(response.content)
    assert len(list(read_timed(tmp_path / "out.mp4"))) == 10
    assert probe(tmp_path / "out.mp4").duration < 20


def test_frames_keep_their_times(server: Server, tmp_path: Path) -> None:
    times = [0, 1, 2, 9, 10, 12]
    response = post(server, stamped(tmp_path / "in.mkv", times), prompt="make it red")
    assert "x-liveedit-differs" not in response.headers
    (tmp_path / "out.mp4").write_bytes(response.content)
    assert [float(time) for time, _ in read_timed(tmp_path / "out.mp4")] == times


def test_a_video_that_would_hold_an_editor_too_long_is_refused(
    small_model: Path, tmp_path: Path
) -> None:
    data = stamped(tmp_path / "in.mkv", list(range(20)))
    for limits in (Limits(max_video_frames=19), Limits(max_video_s=15.0)):
        with serving(small_model, limits) as server:
            response = post(server, data, prompt="x")
            assert response.status_code == 400
            assert "the video has 20 frames in 19 s" in response.json()["error"]["message"]


def test_a_video_that_goes_on_beyond_the_limit_is_cut(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that held back how long it is until it was read."""
    data = stamped(tmp_path / "in.mkv", list(range(40)))

    def short(path: Path) -> VideoInfo:
        return replace(probe(path), frames=5, duration=5.0)

    monkeypatch.setattr("serve.front.upload.probe", short)
    with serving(small_model, Limits(max_video_frames=30)) as server:
        with contextlib.suppress(httpx.RemoteProtocolError):
            post(server, data, prompt="x")
        ended = server.front.services.metrics.ended
        reasons = [s.labels["reason"] for m in ended.collect() for s in m.samples]
        assert set(reasons) == {"bad_request"}


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
                backend = server.engine
                assert backend.capacity.loads
    assert len(pieces) > 3


@pytest.mark.parametrize(
    ("data", "fields", "status", "named"),
    [
        (b"not a video", {"prompt": "x"}, 400, "not a readable video"),
        (None, {}, 400, "prompt"),
        (None, {"prompt": " "}, 400, "prompt"),
        (None, {"prompt": "x", "seed": "-1"}, 400, "seed"),
        (None, {"prompt": "x", "seed": "²"}, 400, "seed"),  # a digit, and no number
        (None, {"prompt": "x", "sed": "1"}, 400, "sed"),
    ],
)
def test_wrong_uploads(
    server: Server, data: bytes | None, fields: dict[str, str], status: int, named: str
) -> None:
    response = post(server, video(clip(9)) if data is None else data, **fields)
    assert response.status_code == status
    assert named in response.json()["error"]["message"]


def test_a_form_holds_one_video_and_few_fields(server: Server) -> None:
    """Each costs memory before anybody reads its name."""
    one = ("video", ("clip.mp4", video(clip(1))))
    for files, fields, named in (
        ([one, one], {"prompt": "x"}, "Too many files"),
        ([one], {"prompt": ["x"] * 9}, "Too many fields"),
    ):
        response = httpx.post(f"{server.http}/v1/edits", files=files, data=fields, timeout=60)
        assert response.status_code == 400
        assert named in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("seed", "named"),
    [
        (2**63 - 1, None),
        (2**63, r"open.seed must lie in [0, 2^63), got 9223372036854775808"),
        (10**19, "the field seed has 20 digits; at most 2^63 - 1"),
    ],
)
def test_seeds_at_their_limit(server: Server, seed: int, named: str | None) -> None:
    response = post(server, video(clip(1)), prompt="x", seed=str(seed))
    assert response.status_code == (400 if named else 200)
    assert named is None or response.json()["error"]["message"] == named


def test_what_a_front_has_become_during_the_upload_counts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None, WireError("draining", "this server is going away; open again")])
    monkeypatch.setattr(server.front.edits, "_refusal", lambda: next(answers))
    response = post(server, video(clip(9)), prompt="x")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert server.front.open_connections == 0


def test_uploads_are_limited_and_paths_stay_inside(small_model: Path) -> None:
    with serving(small_model, Limits(max_upload=10_000, max_pixels=1000)) as server:
        response = post(server, bytes(20_000), prompt="x")
        assert response.status_code == 400
        assert "larger than 10000 bytes" in response.json()["error"]["message"]
        response = post(server, video(clip(2)), prompt="x")
        assert response.json()["error"]["code"] == "unsupported_size"
