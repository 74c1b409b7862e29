"""What is in videos that were edited whole by `POST /v1/edits`, and which are refused."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest

from data.video import probe, read_frames
from serve.client import edit_frames
from serve.limits import Limits
from serve.wire.work import Opening
from tests.data.conftest import write_raw
from tests.known_editors import (
    UNCHANGED,
    block_clip,
    expected_edit,
    write_known_model,
)
from tests.serve.client.test_stream import edited_without_server
from tests.serve.conftest import Server, clip, serving
from tests.serve.pictures.asked import RED, blocks, lossless, post

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("prompt", [UNCHANGED, RED, "paint it green and blue"])
def test_a_video_comes_back_with_the_right_pictures(
    known: Server, tmp_path: Path, prompt: str
) -> None:
    source = block_clip(45, 64, 96, seed=5)
    response = post(known, lossless(tmp_path / "in.mkv", source), prompt=prompt)
    assert response.status_code == 200
    edited = np.stack(list(read_frames(io.BytesIO(response.content))))
    wanted = expected_edit(source, prompt)
    assert edited.shape == wanted.shape
    assert np.abs(blocks(edited) - blocks(wanted)).mean() < 2
    assert np.abs(blocks(edited) - blocks(wanted)).max() < 25


def test_a_videos_sound_comes_back_packet_by_packet(known: Server, tmp_path: Path) -> None:
    source = write_raw(tmp_path / "in.mp4", block_clip(32, 64, 96), audio="aac")
    response = post(known, source, prompt=RED)
    path = tmp_path / "out.mp4"
    path.write_bytes(response.content)
    before, after = packets(source), packets(path)
    assert len(before) > 20
    assert [data for _, data in after] == [data for _, data in before]
    # In its place, but for the encoder's 1024 samples of lead, which a stream cannot cut off.
    shifts = {there - here for (here, _), (there, _) in zip(before, after, strict=True)}
    assert len(shifts) == 1
    assert shifts <= {0, 1024}


def packets(path: Path) -> list[tuple[int, bytes]]:
    with av.open(str(path)) as container:
        (stream,) = container.streams.audio
        return [(p.pts, bytes(p)) for p in container.demux(stream) if p.pts is not None]


def test_a_videos_rate_is_kept_up_to_the_limit(known: Server, tmp_path: Path) -> None:
    frames = block_clip(24, 64, 96)
    for fps, rate, count in ((Fraction(24000, 1001), Fraction(24000, 1001), 24), (80, 60, 18)):
        sent = lossless(tmp_path / "in.mkv", frames, fps)
        path = tmp_path / "out.mp4"
        path.write_bytes(post(known, sent, prompt=RED).content)
        assert float(probe(path).fps) == pytest.approx(float(rate), rel=1e-3)
        assert len(list(read_frames(path))) == count


@pytest.mark.parametrize(("fields", "seed"), [({"seed": "3"}, 3), ({"seed": "0"}, 0), ({}, 0)])
def test_the_seed_is_the_one_that_was_asked_for(
    server: Server, small_model: Path, tmp_path: Path, fields: dict[str, str], seed: int
) -> None:
    source = clip(21)
    # The source's detail is the same with every seed, and most of what this model shows.
    fields = {**fields, "prompt": "x", "detail": "off"}
    response = post(server, lossless(tmp_path / "in.mkv", source), **fields)
    edited = np.stack(list(read_frames(io.BytesIO(response.content))))
    distance = {
        tried: np.abs(
            edited.astype(int) - edited_without_server(small_model, source, "x", tried, "off")
        ).mean()
        for tried in (0, 1, 3)
    }
    assert min(distance, key=lambda tried: distance[tried]) == seed, distance
    assert sorted(distance.values())[0] < 0.9 * sorted(distance.values())[1]


def test_the_wires_seed_is_0_unless_it_is_said(server: Server, small_model: Path) -> None:
    source = clip(12)
    edited = np.stack(list(edit_frames(server.url, source, "x", fps=16, format="rgb24")))
    np.testing.assert_array_equal(edited, edited_without_server(small_model, source, "x", 0))


def test_the_metrics_of_an_upload(tmp_path: Path) -> None:
    with serving(write_known_model(tmp_path / "known")) as server:
        path = lossless(tmp_path / "in.mkv", block_clip(25, 64, 96))
        post(server, path, prompt=RED)
        post(server, path, prompt=" ")
        value = server.front.services.metrics.registry.get_sample_value
        who = {"tenant": "everybody", "model": "known"}
        assert value("liveedit_sessions_admitted_total", who) == 1
        assert value("liveedit_frames_edited_total", who) == 25
        assert value("liveedit_recomputed_share_count") == 3
        assert value("liveedit_chunk_latency_seconds_count") == 3
        assert value("liveedit_first_chunk_seconds_count") == 1
        assert (value("liveedit_gpu_seconds_total", who) or 0) > 0
        refused = {"code": "bad_request", "tenant": "everybody"}
        assert value("liveedit_sessions_refused_total", refused) == 1
        assert value("liveedit_sessions_ended_total", {"reason": "close", **who}) == 1
        assert value("liveedit_sessions") == 0


@pytest.mark.parametrize(
    ("limits", "fields", "status", "code", "named"),
    [
        ({}, {}, 400, "bad_request", "prompt is missing"),
        ({}, {"prompt": " "}, 400, "bad_request", "the prompt is empty"),
        ({}, {"prompt": "x" * 2001}, 400, "bad_request", "2001 characters"),
        ({}, {"prompt": "x", "sed": "1"}, 400, "bad_request", "no field 'sed'"),
        *[
            ({}, {"prompt": "x", "seed": seed}, 400, "bad_request", "seed")
            for seed in ("-1", "1.5", "one", "", "²", " 1", str(2**63))
        ],
        ({}, {"prompt": "x", "work_size": "2/1"}, 400, "bad_request", "work size '2/1' is none"),
        ({}, {"prompt": "x", "detail": "on"}, 400, "bad_request", "must be one of source, off"),
        (
            {"max_work_pixels": 64 * 96 - 1},
            {"prompt": "x", "work_size": "96x64"},
            422,
            "unsupported_size",
            "work size 96x64",
        ),
        ({"max_pixels": 64 * 96 - 1}, {"prompt": "x"}, 422, "unsupported_size", "96x64"),
        ({"max_side": 95}, {"prompt": "x"}, 422, "unsupported_size", "96x64"),
        ({"min_side": 65}, {"prompt": "x"}, 422, "unsupported_size", "96x64"),
        ({"max_upload": 2000}, {"prompt": "x"}, 400, "bad_request", "larger than 2000 bytes"),
    ],
)
def test_a_mistake_in_an_upload_is_refused_with_its_name(
    known: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, int],
    fields: dict[str, str],
    status: int,
    code: str,
    named: str,
) -> None:
    for name, value in limits.items():
        monkeypatch.setitem(known.front.services.limits.__dict__, name, value)
    response = post(known, lossless(tmp_path / "in.mkv", block_clip(9, 64, 96)), **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert named in error["message"]
    engine: Any = known.engine
    assert engine.capacity.loads == {}


def test_an_upload_of_another_kind_is_refused(known: Server) -> None:
    url = f"{known.http}/v1/edits"
    for request, named in (
        ({"data": {"video": "text", "prompt": "x"}}, "video must be a file"),
        ({"files": {"video": b"no video"}, "data": {"prompt": "x"}}, "not a readable video"),
        ({"files": {"video": b"", "more": b""}, "data": {"prompt": "x"}}, "files"),
        ({"content": b"{}", "headers": {"content-type": "application/json"}}, "video"),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            "",
        ),
    ):
        response = httpx.post(url, timeout=20, **request)  # type: ignore[arg-type]
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "bad_request"
        assert named in response.json()["error"]["message"]


def test_an_upload_that_finds_no_room_is_told_to_come_back(tmp_path: Path) -> None:
    with serving(write_known_model(tmp_path / "known"), Limits(), max_sessions=1) as full:
        engine: Any = full.engine
        path = lossless(tmp_path / "in.mkv", block_clip(9, 64, 96))
        full.call(lambda: engine.capacity.admit(Opening("other", "p", 96, 64, 16.0, "live")))
        response = post(full, path, prompt="x")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["code"] == "at_capacity"
